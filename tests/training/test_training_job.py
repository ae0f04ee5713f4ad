"""A job's life without a model: events, checkpoints, pause, failure, and resuming to the same bits."""

from __future__ import annotations

import csv
import errno
import math
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from training_jobs import BASE_DIGEST, SITES, advance, events, make_job, open_job, synthetic_gradients

from coserve.server.training import checkpoint as checkpoint_module
from coserve.server.training.events import EventLog
from coserve.server.training.job import JobError, JobOver
from coserve.server.training.peft.folder import read_folder, version_digest

torch.set_num_threads(1)


def kinds(folder):
    return [event["kind"] for event in events(folder)]


def final_weights(data_dir, folder):
    last = events(folder)[-1]
    assert last["kind"] == "finished", last
    config, weights = read_folder(data_dir / last["data"]["path"], SITES, BASE_DIGEST)
    assert version_digest(BASE_DIGEST, config, weights) == last["data"]["digest"]
    return weights, last["data"]


def assert_same_bits(got, want):
    assert list(got) == list(want)
    for name in want:
        assert torch.equal(got[name].a, want[name].a), name
        assert torch.equal(got[name].b, want[name].b), name
        assert got[name].scaling == want[name].scaling


def test_a_whole_job_leaves_events_checkpoints_and_a_result_table(tmp_path):
    folder = make_job(tmp_path, valid=3, eval_every=4)
    seen = []
    job = open_job(tmp_path, on_event=lambda job_id, seq, record: seen.append((job_id, seq, record)))
    assert (job.tenant, job.priority, job.total_steps, job.step) == ("acme", "normal", 12, 0)
    advance(job)
    assert job.state == "finished" and job.next_batch() is None
    log = events(folder)
    assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
    assert [record for _, _, record in seen] == log
    assert log[0]["message"] == "Fine-tuning job started" and log[0]["data"]["total_steps"] == 12
    steps = [event["data"] for event in log if event["kind"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert [step["step"] for step in steps if "valid_loss" in step] == [4, 8, 12]
    assert steps[0]["learning_rate"] == 0 and steps[1]["learning_rate"] == 5e-3
    assert steps[2]["train_loss"] == 1.0 and steps[3]["valid_loss"] == 0.5
    # an epoch of 7 rows is 4 steps; rows have 2 to 8 tokens, of which all but the first bear loss
    assert sum(step["tokens"] for step in steps) == 3 * 35
    assert sum(step["loss_tokens"] for step in steps) == 3 * 28
    made = [event["data"] for event in log if event["kind"] == "checkpoint"]
    assert [data["step"] for data in made] == [4, 8, 12]
    assert made[0]["metrics"]["valid_loss"] == 0.5 and made[0]["resumable"]
    _, finished = final_weights(tmp_path, folder)
    assert finished["step"] == 12 and finished["trained_tokens"] == 105
    rows = list(csv.DictReader((tmp_path / finished["result_file"]).open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert rows[3]["valid_loss"] == "0.5" and rows[2]["valid_loss"] == ""
    with pytest.raises(JobOver):
        open_job(tmp_path)


@pytest.mark.parametrize("reopen", [True, False])
def test_pauses_and_resumes_end_in_the_same_bits(tmp_path, reopen):
    calm = make_job(tmp_path / "calm", valid=2, eval_every=3, early_stopping_patience=4)
    advance(open_job(tmp_path / "calm"))
    broken = make_job(tmp_path / "broken", valid=2, eval_every=3, early_stopping_patience=4)
    job = open_job(tmp_path / "broken")
    for _ in range(5):
        advance(job, 2)
        job.next_batch()  # begun and dropped
        job.pause()
        job.pause()
        assert job.state == "paused" and job.next_batch() is None
        if reopen:
            job.close()
            job = open_job(tmp_path / "broken")
        else:
            assert job.resume()
    advance(job)
    want, _ = final_weights(tmp_path / "calm", calm)
    got, data = final_weights(tmp_path / "broken", broken)
    assert_same_bits(got, want)
    assert data["trained_tokens"] == 105
    assert (calm / "result.csv").read_bytes() == (broken / "result.csv").read_bytes()


def test_a_pause_before_an_evaluation_evaluates_after_the_resume(tmp_path):
    folder = make_job(tmp_path, valid=2, eval_every=1)
    job = open_job(tmp_path)
    batch = job.next_batch()
    job.finish_train(batch, synthetic_gradients(job, batch), 1.0, 0)
    assert job.next_batch().kind == "eval"
    job.pause()
    job.close()
    job = open_job(tmp_path)
    assert job.step == 1 and job.next_batch().kind == "eval"
    advance(job, 1)
    first = next(event for event in events(folder) if event["kind"] == "step")
    assert first["data"]["valid_loss"] == 0.5


def test_a_killed_job_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    calm = make_job(tmp_path / "calm", checkpoint_every=3)
    advance(open_job(tmp_path / "calm"))
    folder = make_job(tmp_path / "killed", checkpoint_every=3)
    for _ in range(3):
        job = open_job(tmp_path / "killed")
        advance(job, 5)
        job.close()  # no pause, no checkpoint: what happened since the last one is lost
    advance(open_job(tmp_path / "killed"))
    want, _ = final_weights(tmp_path / "calm", calm)
    got, data = final_weights(tmp_path / "killed", folder)
    assert_same_bits(got, want)
    assert data["trained_tokens"] == 105
    assert (calm / "result.csv").read_bytes() == (folder / "result.csv").read_bytes()


def test_early_stopping_counts_across_a_resume(tmp_path):
    folder = make_job(tmp_path, rows=8, valid=1, n_epochs=10, eval_every=1, early_stopping_patience=3)
    job = open_job(tmp_path)
    advance(job, 3)  # the first evaluation sets the mark, two more do not beat it
    assert job.state == "running"
    job.pause()
    job.close()
    job = open_job(tmp_path)
    advance(job)
    assert job.state == "finished" and events(folder)[-1]["data"]["step"] == 4


def test_old_checkpoints_lose_optimizer_state_first_then_go(tmp_path):
    folder = make_job(tmp_path, checkpoint_every=1, keep_checkpoints=4)
    advance(open_job(tmp_path))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (9, 10, 11, 12)]
    with_state = [name for name in kept if (folder / "checkpoints" / name / "optimizer.safetensors").exists()]
    assert with_state == ["step-00000011", "step-00000012"]
    gone = [event["data"]["step"] for event in events(folder) if event["kind"] == "pruned"]
    assert gone == list(range(1, 9))


def test_publishing_makes_a_checkpoint_that_outlives_pruning(tmp_path):
    folder = make_job(tmp_path, checkpoint_every=1, keep_checkpoints=1, publish_every=5)
    advance(open_job(tmp_path))
    published = [event["data"] for event in events(folder) if event["kind"] == "published"]
    assert [data["step"] for data in published] == [5, 10]
    assert all((tmp_path / data["path"] / "adapter_model.safetensors").exists() for data in published)


def test_a_pause_at_a_published_step_does_not_publish_again_or_lose_its_protection(tmp_path):
    folder = make_job(tmp_path, checkpoint_every=1, keep_checkpoints=1, publish_every=5)
    job = open_job(tmp_path)
    advance(job, 5)
    job.pause()
    job.close()
    job = open_job(tmp_path)
    advance(job, 4)
    assert kinds(folder).count("published") == 1
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000005", "step-00000009"]


def test_steps_that_are_not_finite_are_skipped_and_five_in_a_row_fail_the_job(tmp_path):
    folder = make_job(tmp_path, rows=40, n_epochs=1, checkpoint_every=2)
    job = open_job(tmp_path)
    advance(job, 3)
    for step in range(4):
        before = {name: (pair.a.clone(), pair.b.clone()) for name, pair in job.params.items()}
        batch = job.next_batch()
        grads = synthetic_gradients(job, batch)
        if step % 2:
            grads[SITES[1].name].b[0, 0] = math.inf
            job.finish_train(batch, grads, 1.0, 0)
        else:
            job.finish_train(batch, grads, math.nan, 0)
        assert all(torch.equal(before[name][0], pair.a) for name, pair in job.params.items())
        assert all(torch.equal(before[name][1], pair.b) for name, pair in job.params.items())
    advance(job, 1)  # a good step ends the row
    for _ in range(5):
        assert job.state == "running"
        batch = job.next_batch()
        job.finish_train(batch, synthetic_gradients(job, batch), math.nan, 0)
    assert job.state == "failed" and job.next_batch() is None
    skipped = [event["data"]["reason"] for event in events(folder) if event["kind"] == "skipped_step"]
    assert skipped[:4] == ["non_finite_loss", "non_finite_gradient"] * 2 and len(skipped) == 9
    last = events(folder)[-1]
    assert last["kind"] == "failed" and last["data"]["code"] == "loss_diverged"
    _, weights = read_folder(tmp_path / last["data"]["checkpoint"], SITES)
    assert all(torch.isfinite(pair.a).all() for pair in weights.values())


def test_a_step_without_labels_is_left_out(tmp_path):
    from training_jobs import write_rows

    folder = make_job(tmp_path, batch_size=1, n_epochs=1, shuffle=False)
    path = folder / "tokens" / "train.safetensors"
    path.unlink()
    write_rows(path, [[1, 2, 3], [4, 5, 6]], [[-100, -100, -100], [-100, 5, 6]])
    job = open_job(tmp_path)
    advance(job)
    assert job.state == "finished"
    assert [event["data"]["step"] for event in events(folder) if event["kind"] == "step"] == [2]


def test_cancel_ends_the_job_and_drops_late_reports(tmp_path):
    folder = make_job(tmp_path)
    job = open_job(tmp_path)
    advance(job, 2)
    batch = job.next_batch()
    job.cancel()
    job.cancel()
    job.finish_train(batch, synthetic_gradients(job, batch), 1.0, 0)
    assert job.step == 2 and kinds(folder).count("cancelled") == 1 and kinds(folder)[-1] == "cancelled"
    with pytest.raises(JobOver):
        open_job(tmp_path)


def test_a_full_disk_pauses_the_job_and_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    calm = make_job(tmp_path / "calm", checkpoint_every=3)
    advance(open_job(tmp_path / "calm"))
    folder = make_job(tmp_path / "full", checkpoint_every=3)
    job = open_job(tmp_path / "full")
    with monkeypatch.context() as patch:

        def no_room(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(checkpoint_module, "write_tensors", no_room)
        advance(job)
        assert (job.state, job.paused_reason, job.step) == ("paused", "storage_full", 3)
        assert not job.resume()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == []
    assert events(folder)[-1]["data"]["reason"] == "storage_full"
    assert job.resume()
    advance(job)
    want, _ = final_weights(tmp_path / "calm", calm)
    got, _ = final_weights(tmp_path / "full", folder)
    assert_same_bits(got, want)


def test_a_damaged_newest_checkpoint_is_dropped_for_the_one_before(tmp_path):
    calm = make_job(tmp_path / "calm", checkpoint_every=2)
    advance(open_job(tmp_path / "calm"))
    folder = make_job(tmp_path / "hurt", checkpoint_every=2)
    job = open_job(tmp_path / "hurt")
    advance(job, 7)
    job.close()
    path = folder / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    job = open_job(tmp_path / "hurt")
    assert job.step == 4
    assert [event["data"]["step"] for event in events(folder) if event["kind"] == "warning"] == [6]
    assert [event["data"]["step"] for event in events(folder) if event["kind"] == "pruned"] == [6]
    advance(job)
    assert_same_bits(final_weights(tmp_path / "hurt", folder)[0], final_weights(tmp_path / "calm", calm)[0])


def test_a_checkpoint_whose_event_was_lost_is_announced_on_opening(tmp_path):
    folder = make_job(tmp_path, checkpoint_every=2, publish_every=2)
    job = open_job(tmp_path)
    advance(job, 2)
    job.close()
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"checkpoint"' not in line and b'"published"' not in line]
    (folder / "events.jsonl").write_bytes(b"".join(kept))
    open_job(tmp_path).close()
    after = kinds(folder)[len(kept) :]
    assert after == ["checkpoint", "started", "published"]


def test_a_checkpoint_without_optimizer_state_is_passed_over(tmp_path):
    make_job(tmp_path, checkpoint_every=2)
    job = open_job(tmp_path)
    advance(job, 5)
    job.close()
    folder = tmp_path / "jobs" / "ftjob-1" / "checkpoints"
    (folder / "step-00000004" / "optimizer.safetensors").unlink()
    job = open_job(tmp_path)
    assert job.step == 2
    job.close()
    for name in ("adapter_model.safetensors", "state.json"):
        (folder / "step-00000002" / name).unlink()
    job = open_job(tmp_path)
    assert job.step == 0 and list(folder.iterdir()) == []
    advance(job)
    assert job.state == "finished"


@contextmanager
def files_no_larger_than(size):
    """The kernel refuses writes past `size`, as it does on a disk that is broken."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_event_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append("started", "info", "go", {})
    before = (tmp_path / "events.jsonl").read_bytes()
    with files_no_larger_than(len(before) + 10), pytest.raises(OSError):
        log.append("step", "info", "one", {"step": 1})
    assert (tmp_path / "events.jsonl").read_bytes() == before
    assert log.append("step", "info", "one", {"step": 1})[0] == 2
    assert [record["seq"] for record in log.records()] == [1, 2]


def test_a_disk_that_takes_no_writes_fails_the_job_and_raises_nothing(tmp_path):
    folder = make_job(tmp_path, checkpoint_every=2)
    job = open_job(tmp_path)
    advance(job, 1)
    with files_no_larger_than((folder / "events.jsonl").stat().st_size):
        advance(job)
        assert job.state == "failed" and job.next_batch() is None
        job.fail("again", "again")
        job.cancel()
        job.pause()
    job.close()
    assert kinds(folder) == ["started", "step"]
    assert open_job(tmp_path).state == "running"  # nothing durable says otherwise: it can be tried again


@pytest.mark.parametrize(
    "damage, code",
    [
        (lambda folder: (folder / "spec.json").write_text("{}"), "invalid_job"),
        (lambda folder: (folder / "tokens" / "train.safetensors").write_bytes(b"x" * 30), "invalid_training_file"),
        (lambda folder: (folder / "spec.json").write_text(
            (folder / "spec.json").read_text().replace(BASE_DIGEST, "c" * 64)), "base_model_mismatch"),
        (lambda folder: (folder / "spec.json").write_text(
            (folder / "spec.json").read_text().replace('"init": null', '"init": "adapters/none"')), "adapter_invalid"),
        (lambda folder: (folder / "spec.json").write_text(
            (folder / "spec.json").read_text().replace('"all-linear"', '["x_proj"]')), "unsupported_value"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_run_fails_with_a_code_and_an_event(tmp_path, damage, code):
    folder = make_job(tmp_path)
    damage(folder)
    with pytest.raises(JobError) as caught:
        open_job(tmp_path)
    assert caught.value.code == code
    assert kinds(folder) == ["failed"] and events(folder)[0]["data"]["code"] == code


def test_a_job_can_start_from_another_adapter(tmp_path):
    first = make_job(tmp_path, "ftjob-1")
    advance(open_job(tmp_path, "ftjob-1"))
    trained, data = final_weights(tmp_path, first)
    make_job(tmp_path, "ftjob-2", adapter={"init": data["path"]})
    job = open_job(tmp_path, "ftjob-2")
    assert_same_bits(job.params, trained)


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path):
    make_job(tmp_path)
    with pytest.raises(JobError, match="vocabulary"):
        open_job(tmp_path, vocab_size=5)
