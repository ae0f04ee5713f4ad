"""The pure parts of finetuning jobs: defaults, arithmetic, the queue, the event file, translation."""

import json
from dataclasses import replace

import pytest

from coserve.server.gateway.job_events import Pace, translate
from coserve.server.gateway.job_log import read_after
from coserve.server.gateway.job_queue import Holding, Waiting, in_turns, to_start, to_yield
from coserve.server.gateway.job_spec import (
    engine_spec,
    fine_tuned_model_id,
    full_adapter,
    full_hyperparameters,
    full_training,
    resolved_hyperparameters,
    total_steps,
)
from coserve.server.store.jobs import Job
from coserve.server.training.spec import parse_spec


def make_job(**fields):
    values = {
        "id": "ftjob-x", "tenant": "t", "created_at": 1, "status": "running", "model": "base",
        "training_file": "file-1",
        "validation_file": None, "seed": 5, "suffix": None, "metadata": None, "method": {},
        "hyperparameters": full_hyperparameters({}), "adapter": full_adapter({}), "training": full_training({}, {}),
        "spec": None, "adapter_id": "adapter-x", "fine_tuned_model": "ft:base:t::x", "result_files": (),
        "trained_tokens": None, "error": None, "finished_at": None, "estimated_finish": None, "progress": {},
        "requested": None, "last_seq": 0, "crashes": 0,
    }  # fmt: skip
    return Job(**{**values, **fields})


def record(kind, at=1000.0, message="m", **data):
    return {"seq": 1, "created_at": at, "kind": kind, "level": "info", "message": message, "data": data}


# --------------------------------------------------------------------------- spec


def test_auto_is_three_epochs_of_batches_of_eight():
    assert resolved_hyperparameters({}) == {"batch_size": 8, "learning_rate_multiplier": 1.0, "n_epochs": 3}
    assert resolved_hyperparameters({"n_epochs": 2, "batch_size": "auto"})["n_epochs"] == 2


def test_the_multiplier_multiplies_the_default_learning_rate():
    assert full_training({}, {})["learning_rate"] == 2e-4
    assert full_training({}, {"learning_rate_multiplier": 0.5})["learning_rate"] == 1e-4
    assert full_training({"learning_rate": 3e-3}, {})["learning_rate"] == 3e-3


@pytest.mark.parametrize(
    ("rows", "hyperparameters", "training", "steps"),
    [
        (16, {}, {}, 6),
        (17, {}, {}, 9),
        (17, {"batch_size": 4, "n_epochs": 1}, {"gradient_accumulation_steps": 2}, 3),
        (1, {"n_epochs": 5}, {}, 5),
        (1000, {}, {"max_steps": 7}, 7),
        (8, {"n_epochs": 1}, {"max_steps": 7}, 1),
    ],
)
def test_total_steps(rows, hyperparameters, training, steps):
    assert total_steps(rows, hyperparameters, full_training(training, hyperparameters)) == steps


def test_the_engine_accepts_every_spec_that_is_built():
    job = make_job(training=full_training({"eval_every": 3, "max_steps": 4, "betas": [0.8, 0.9]}, {}))
    spec = parse_spec(json.dumps(engine_spec(job, "b" * 64, has_validation=True, init=None)).encode())
    assert (spec.job_id, spec.seed, spec.training.batch_size, spec.training.n_epochs) == ("ftjob-x", 5, 8, 3)
    assert spec.training.betas == (0.8, 0.9) and spec.training.eval_every == 3 and spec.has_validation
    going_on = make_job(adapter={**full_adapter({}), "target_modules": ".*q_proj", "init_path": "adapters/t/a/d"})
    document = engine_spec(going_on, "b" * 64, has_validation=False, init="jobs/ftjob-x/init")
    assert parse_spec(json.dumps(document).encode()).adapter.init == "jobs/ftjob-x/init"


def test_model_ids():
    assert fine_tuned_model_id("org/base", "acme", "mine", "ftjob-abc") == "ft:org/base:acme:mine:abc"
    assert fine_tuned_model_id("base", "acme", None, "ftjob-abc") == "ft:base:acme::abc"


# --------------------------------------------------------------------------- queue


def waiting(*jobs):
    return [Waiting(name, crashes) for name, crashes in jobs]


def test_first_come_first_served_up_to_the_bound():
    assert to_start(waiting(("a", 0), ("b", 0), ("c", 0)), {}, 2) == ["a", "b"]
    assert to_start(waiting(("a", 0)), {"x": 0, "y": 0}, 2) == []


def test_slots_go_to_the_tenant_with_fewest_jobs_running():
    queue = [Waiting(name, 0, name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]

    def order(**running):
        return [job.job_id for job in in_turns(queue, running, {})]

    assert order() == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert order(a=2, b=1) == ["c1", "b1", "a1", "b2", "a2", "a3"]
    assert [job.job_id for job in in_turns(queue[:3], {"a": 5}, {})] == ["a1", "a2", "a3"]


def test_slots_follow_weights():
    queue = [Waiting(name, 0, name[0]) for name in ("a1", "a2", "a3", "b1", "b2")]
    assert [job.job_id for job in in_turns(queue, {}, {"a": 3.0})] == ["a1", "b1", "a2", "a3", "b2"]
    assert in_turns(queue, {"a": 3, "b": 1}, {"a": 3.0})[0].job_id == "a1"
    assert in_turns(queue, {"a": 4, "b": 1}, {"a": 3.0})[0].job_id == "b1"


def given_back(slots, waits, weights=None, most=None, kept=(), low=()):
    """Who gives a slot to the tenant `waits`; a job is named by its tenant and a number."""
    holding = [Holding(name, name[0], name in low, name not in kept) for name in slots]
    return to_yield(holding, [Waiting("w", 0, waits)], weights or {}, most or len(slots))


def test_a_tenant_with_several_jobs_gives_a_slot_to_one_that_has_too_few():
    assert given_back(["a1", "a2", "a3"], "b") == "a3", "the youngest"
    assert given_back(["a1", "a2", "a3"], "b", kept=["a3"]) == "a2", "of those that have had their slice"
    assert given_back(["a1", "a2", "a3"], "b", low=["a1"]) == "a1", "low jobs first"
    assert given_back(["a1", "a2", "a3"], "b", most=4) is None, "there is a free slot"
    assert given_back(["a1"], "b") is None, "whoever has one keeps it"
    assert given_back(["a1", "a2", "b1", "b2"], "b") is None and given_back(["a1", "a2"], "a") is None
    assert given_back(["a1", "a2", "b1", "c1", "c2", "c3"], "b") == "c3"
    assert given_back(["a1", "a2", "c1", "c2", "c3"], "b", kept=["c1", "c2", "c3"]) == "a2"
    assert given_back(["a1", "a2", "a3"], "b", weights={"a": 3.0}) is None, "three of three to one is its share of four"
    assert given_back(["a1", "a2", "a3", "b1"], "b", weights={"b": 3.0}) == "a3"


def test_slots_that_are_given_back_settle():
    """Nobody loses the same slot again as long as the same jobs are there."""
    slots, queue = [f"a{i}" for i in range(8)], [f"b{i}" for i in range(8)]
    for _ in range(8):
        waiting = [Waiting(name, 0, name[0]) for name in sorted(queue)]
        holding = [Holding(name, name[0], False, True) for name in slots]
        yielded = to_yield(holding, waiting, {}, 8)
        if yielded is None:
            break
        slots.remove(yielded)
        queue.append(yielded)
        running = {tenant: sum(name[0] == tenant for name in slots) for tenant in "ab"}
        taken = in_turns([Waiting(name, 0, name[0]) for name in sorted(queue)], running, {})[0].job_id
        assert taken[0] == "b"
        queue.remove(taken)
        slots.append(taken)
    assert sum(name[0] == "a" for name in slots) == 4


def test_suspects_start_one_at_a_time_the_least_suspected_first():
    assert to_start(waiting(("a", 2), ("b", 1), ("c", 1)), {}, 8) == ["b"]
    assert to_start(waiting(("a", 1), ("b", 0)), {"x": 1}, 8) == ["b"]
    assert to_start(waiting(("a", 1)), {"x": 0}, 8) == ["a"]


# --------------------------------------------------------------------------- event file


def test_records_after_a_number_and_no_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_after(path, 0) == []
    lines = [json.dumps({"seq": number}) + "\n" for number in (1, 2, 3)]
    path.write_text("".join(lines) + '{"seq": 4')
    assert [r["seq"] for r in read_after(path, 0)] == [1, 2, 3]
    assert [r["seq"] for r in read_after(path, 2)] == [3]
    assert read_after(path, 3) == []
    path.write_text(lines[0] + lines[2])
    assert [r["seq"] for r in read_after(path, 0)] == [1]
    path.write_text(lines[0] + "[]\n")
    assert len(read_after(path, 0)) == 1


# --------------------------------------------------------------------------- translation


def step(number, at, **data):
    values = {"step": number, "total_steps": 10, "train_loss": 2.0, "train_mean_token_accuracy": 0.1, "tokens": 50}
    return record("step", at, f"Step {number}/10: training loss=2.00", **{**values, **data})


def test_a_step_becomes_a_metrics_event_and_progress():
    pace = Pace()
    job = make_job()
    translate(job, record("started", 100.0, total_steps=10), pace)
    translate(job, step(1, 102.0), pace)
    translated = translate(job, step(2, 104.0, valid_loss=3.0, learning_rate=1e-4), pace)
    event = translated.change.events[0]
    assert event.type == "metrics" and event.message == "Step 2/10: training loss=2.00" and event.created_at == 104
    assert event.data == {
        "step": 2, "total_steps": 10, "train_loss": 2.0, "train_mean_token_accuracy": 0.1, "valid_loss": 3.0
    }  # fmt: skip
    progress = translated.change.progress
    assert progress["tokens_per_second"] == 25.0 and progress["eta_seconds"] == 16.0
    assert translated.change.estimated_finish == 120


def test_the_pace_forgets_time_in_which_nothing_ran():
    pace = Pace()
    pace.restart(0.0)
    pace.step(1.0, 10)
    pace.restart(1000.0)
    pace.step(1001.0, 10)
    assert pace.seconds_per_step == 1.0 and pace.tokens_per_second == 10.0


def test_a_queued_job_runs_as_soon_as_anything_comes_of_it():
    assert translate(make_job(status="queued"), record("started", total_steps=3), Pace()).change.status == "running"
    assert translate(make_job(status="queued"), step(1, 1.0), Pace()).change.status == "running"
    assert translate(make_job(), step(1, 1.0), Pace()).change.status is None


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
@pytest.mark.parametrize("kind", ["step", "checkpoint", "published", "finished", "failed", "paused", "cancelled"])
def test_an_ended_job_stays_as_it_is(status, kind):
    translated = translate(make_job(status=status), record(kind), Pace())
    assert translated.change == type(translated.change)() and translated.published is None
    assert translated.checkpoint is None and translated.released == (
        kind in ("finished", "failed", "paused", "cancelled")
    )


def test_only_a_pause_that_was_asked_for_pauses():
    asked = translate(make_job(requested="pause"), record("paused", step=1), Pace())
    assert asked.change.status == "paused" and asked.change.clear_requested and asked.released
    shutdown = translate(make_job(), record("paused", step=1), Pace())
    assert shutdown.change.status is None and shutdown.released
    full = translate(make_job(), record("paused", step=1, reason="storage_full"), Pace())
    assert full.change.status == "paused" and full.change.progress["reason"] == "storage_full"


def test_crashes_are_forgiven_by_new_steps_only():
    job = make_job(crashes=2, progress={"furthest_step": 4})
    assert translate(job, step(4, 1.0), Pace()).change.crashes is None
    assert translate(job, step(5, 1.0), Pace()).change.crashes == 0
    assert translate(replace(job, crashes=0), step(5, 1.0), Pace()).change.crashes is None
