"""A request that comes while an iteration trains waits for the unit under way, not for all that were planned."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from engine_process import write_job
from peft_oracle import prompt, training_rows
from safetensors.torch import load_file
from stepped_engine import DIGEST, SteppedEngine

from coserve.server.wire.messages import Abort, Generate, SamplingParams
from coserve.server.wire.sync import EngineSocket

pytestmark = pytest.mark.usefixtures("one_thread")


def run_job(folder: Path, asked) -> tuple[SteppedEngine, dict[str, torch.Tensor], list[dict]]:
    folder.mkdir()
    engine = SteppedEngine(folder, blocks=128, itl=5.0, train_window=16, ahead=False, asked=asked)
    write_job(folder, "job", DIGEST, training_rows(16), batch_size=8, n_epochs=2)
    engine.trainer.start("job")
    engine.until(lambda: not engine.trainer.job_ids, seconds=60)
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
    assert all(r["predicted_s"] < 0.2 for r in records)
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


ITL = 0.06


class Stalls:
    """A machine whose packed forwards sometimes take longer than it could know."""

    def __init__(self, engine: SteppedEngine, when) -> None:
        self.runner, self.when, self.count, self.times = engine.engine._runner, when, 0, []
        self.forward, self.runner._forward = self.runner._forward, self.stall

    def stall(self, *arguments) -> None:
        self.forward(*arguments)
        self.count += 1
        if self.when(self.count):
            self.times.append(time.time())
            time.sleep(ITL)

    def hit(self, record: dict) -> bool:
        return any(record["started_at"] <= at <= record["started_at"] + record["measured_s"] for at in self.times)


def beside_a_stream(folder: Path, when, most: int = 2000) -> tuple[dict[str, torch.Tensor], list[dict], list[dict]]:
    """A job's weights, and the iterations that carried a decode: those without a stall, and those with one. After
    `most` iterations the job is stopped and there are no weights."""
    folder.mkdir()
    engine = SteppedEngine(folder, blocks=256, itl=ITL, train_window=16, ahead=False)
    stalls, streams = Stalls(engine, when), 0
    write_job(folder, "job", DIGEST, training_rows(16), batch_size=8, n_epochs=6)
    engine.trainer.start("job")
    while engine.trainer.job_ids:
        if engine.counters["coserve_iterations_total"] == most:
            engine.trainer.stop("job", pause=False)
        if not len(engine.requests):
            engine.submit(f"s{streams}", prompt(8, streams), max_tokens=200)
            streams += 1
        if not engine.engine.step():
            time.sleep(0.001)
    last = json.loads((folder / "jobs" / "job" / "events.jsonl").read_text().splitlines()[-1])
    path = last["data"].get("path")
    weights = load_file(folder / path / "adapter_model.safetensors") if path else {}
    records = [r for r in engine.engine._iterations.latest(2000) if r["streams"]]
    return weights, [r for r in records if not stalls.hit(r)], [r for r in records if stalls.hit(r)]


def test_units_of_an_iteration_that_is_late_already_run_in_the_next_one(tmp_path):
    weights, plain, _ = beside_a_stream(tmp_path / "plain", lambda count: False)
    stalled, others, late = beside_a_stream(tmp_path / "stalled", lambda count: count % 5 == 0)
    assert sum(r["units"] for r in plain) > 100 and sum(r["units"] for r in others) > 100
    assert weights.keys() == stalled.keys() != set()
    assert len(late) > 8 and sum(r["units"] == 0 for r in late) > 0.8 * len(late), "the others were owed their floor"
    assert all(torch.allclose(stalled[name], weights[name], rtol=1e-3, atol=1e-5) for name in weights)


def test_a_machine_that_is_always_late_still_trains(tmp_path):
    _, before, late = beside_a_stream(tmp_path / "slow", lambda count: count > 40, most=120)
    assert sum(r["units"] for r in before) > 20, "what units cost is known"
    assert len(late) > 60 and 0 < sum(r["units"] for r in late) < len(late), "the floor's"
