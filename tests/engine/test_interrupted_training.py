"""A request that comes while an iteration trains waits for the unit under way, not for all that were planned."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median

import pytest
import torch
from engine_process import write_job
from peft_oracle import prompt, training_rows
from safetensors.torch import load_file
from stepped_engine import DIGEST, SteppedEngine

from coserve.server.wire.messages import Abort, Generate, SamplingParams
from coserve.server.wire.sync import EngineSocket

pytestmark = pytest.mark.usefixtures("one_thread")


def run_job(folder: Path, asked, itl: float = 5.0) -> tuple[SteppedEngine, dict[str, torch.Tensor], list[dict]]:
    folder.mkdir()
    engine = SteppedEngine(folder, blocks=128, itl=itl, train_window=16, ahead=False, asked=asked)
    write_job(folder, "job", DIGEST, training_rows(16), batch_size=8, n_epochs=2)
    engine.trainer.start("job")
    engine.until(lambda: not engine.trainer.job_ids, seconds=150)
    last = json.loads((folder / "jobs" / "job" / "events.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "finished"
    weights = load_file(folder / last["data"]["path"] / "adapter_model.safetensors")
    return engine, weights, list(engine.engine._iterations.latest(2000))


def test_units_that_are_left_run_later_to_the_same_bits(tmp_path):
    turns = iter(range(10**9))
    _, whole, plain = run_job(tmp_path / "whole", lambda: False)
    _, cut, records = run_job(tmp_path / "cut", lambda: next(turns) % 3 == 2)
    assert max(r["units"] for r in plain) > 6 and max(r["units"] for r in records) <= 3
    assert len(records) > len(plain)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    for kind in ("train_forward", "head", "train_backward"):
        totals = [sum(r["tokens"][kind] for r in some) for some in (plain, records)]
        assert totals[0] == pytest.approx(totals[1])


def test_windows_and_head_batches_that_stop_on_their_way_end_in_the_same_bits(tmp_path):
    """A quarter of a short promise is less than a window or a batch of label rows takes."""
    _, whole, plain = run_job(tmp_path / "whole", lambda: False)
    _, sliced, records = run_job(tmp_path / "sliced", lambda: False, itl=0.004)
    shares = [r["tokens"]["train_forward"] % 1 for r in records]
    assert any(0.01 < share < 0.99 for share in shares), "no window stopped between two layers"
    assert len(records) > 2 * len(plain)
    assert all(torch.equal(sliced[name], whole[name]) for name in whole)


def test_what_did_not_run_is_neither_predicted_nor_learned_nor_charged(tmp_path):
    asked = [False]
    engine = SteppedEngine(tmp_path, blocks=128, itl=5.0, train_window=16, ahead=False, asked=lambda: asked[0])
    write_job(tmp_path, "job", DIGEST, training_rows(16), batch_size=16, n_epochs=8)
    engine.trainer.start("job")
    engine.until(lambda: engine.counters["coserve_iterations_total"] > 20)
    asked[0] = True
    engine.until(lambda: engine.counters["coserve_iterations_total"] > 40)
    records = [r for r in engine.engine._iterations.latest(15) if r["units"]]
    assert records and all(r["units"] == 1 for r in records)
    # A unit of toy size takes about a millisecond, a planned iteration up to five seconds.
    assert median(r["predicted_s"] for r in records) < 0.2, "one may be told of the machine's own stalls"
    engine.trainer.stop("job", pause=False)
    engine.until(lambda: not engine.trainer.job_ids)


def test_only_a_request_asks(tmp_path):
    sock = EngineSocket(str(tmp_path / "s"))
    sock._inbox.append((Abort("r"), None))
    assert not sock.asked
    sock._inbox.append(
        (Generate("r", "t", (1, 2), SamplingParams(max_tokens=1, seed=0), None, "s", time.monotonic()), None)
    )
    assert sock.asked
    sock._inbox.clear()
    assert not sock.asked


def beside_streams(folder: Path, late) -> tuple[dict[str, torch.Tensor], list[dict], list[dict]]:
    """A job's weights, and the iterations that carried a decode and were planned with units: those of which `late` says
    that they have become too long for their units, and the others; `whole_s` is what was predicted with all units."""
    folder.mkdir()
    engine = SteppedEngine(folder, blocks=256, itl=5.0, train_window=16, ahead=False)
    planned, whole, streams, scheduler = [], [], 0, engine.engine._scheduler
    plan_of = scheduler.plan

    def plan(state, draft=None):
        made = plan_of(state, draft)
        planned.append(bool(made.decodes and made.units))
        whole.append(made.predicted_seconds)
        starts = (0.0 if late(sum(planned)) else inf,) * len(made.unit_starts)
        scheduler._planned = made = replace(made, unit_starts=starts)
        return made

    scheduler.plan = plan
    write_job(folder, "job", DIGEST, training_rows(16), batch_size=8, n_epochs=4)
    engine.trainer.start("job")
    pairs = []
    while engine.trainer.job_ids:
        if not len(engine.requests):
            engine.submit(f"s{streams}", prompt(8, streams), max_tokens=200)
            streams += 1
        before = engine.counters["coserve_iterations_total"]
        if not engine.engine.step():
            time.sleep(0.001)
        elif engine.counters["coserve_iterations_total"] > before and planned[-1]:
            record = {**engine.engine._iterations.latest(1)[0], "whole_s": whole[-1]}
            pairs.append((late(sum(planned)), record))
    last = json.loads((folder / "jobs" / "job" / "events.jsonl").read_text().splitlines()[-1])
    weights = load_file(folder / last["data"]["path"] / "adapter_model.safetensors")
    return weights, [r for was_late, r in pairs if was_late], [r for was_late, r in pairs if not was_late]


def test_units_of_an_iteration_that_is_late_run_in_a_later_one(tmp_path):
    weights, _, plain = beside_streams(tmp_path / "plain", lambda number: False)
    again, late, others = beside_streams(tmp_path / "late", lambda number: number % 2 == 1)
    assert len(late) > 3 and all(r["units"] == 0 and r["tokens"]["decode"] == 1 for r in late)
    assert all(r["units"] > 0 for r in (*plain, *others))
    assert all(r["predicted_s"] < r["whole_s"] for r in late), "without what did not run"
    assert all(r["predicted_s"] == r["whole_s"] for r in others)
    for kind in ("train_forward", "head", "train_backward"):
        assert sum(r["tokens"][kind] for r in plain) == pytest.approx(sum(r["tokens"][kind] for r in (*late, *others)))
    assert weights.keys() == again.keys() != set()
    assert all(torch.allclose(again[name], weights[name], rtol=1e-3, atol=1e-5) for name in weights)
