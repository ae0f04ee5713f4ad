"""One memory for streams and steps in a real engine: a step gives way, comes back, and nobody's result is another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_process import write_job
from peft_oracle import assert_greedy_equal, oracle_model, prompt, training_rows
from safetensors.torch import load_file
from stepped_engine import DIGEST, ONE_ADAPTER, SteppedEngine
from tiny_models import save_tiny_model

from coserve.server.engine.activation_store import ActivationStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return oracle_model(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def moves(engine: SteppedEngine, move: str) -> float:
    return engine.counters[f'coserve_sweep_moves_total{{move="{move}"}}']


def step_of(engine: SteppedEngine) -> object:
    """The sweep under way."""
    return next(iter(engine.trainer.sweeps.values()), None)


def trained(engine: SteppedEngine) -> dict[str, torch.Tensor]:
    lines = (engine.data_dir / "jobs" / "job" / "events.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["kind"] == "finished", last
    return load_file(engine.data_dir / last["data"]["path"] / "adapter_model.safetensors")


def engine_with_a_step(folder: Path, streams: dict[str, int], activations: str, turns: int) -> SteppedEngine:
    """Long streams come when a step has come `turns` units far; runs to the end of all."""
    folder.mkdir()
    # Iterations hold a unit or two, so that a step lasts for many of them.
    engine = SteppedEngine(
        folder, blocks=20, activation_blocks=130, pool_bytes=ONE_ADAPTER, itl=2e-3, activations=activations,
        train_window=16,
    )  # fmt: skip
    write_job(folder, "job", DIGEST, training_rows(16), batch_size=16, n_epochs=2)
    engine.trainer.start("job")
    done = 0

    def far() -> bool:
        nonlocal done
        sweep = step_of(engine)
        done += sweep is not None and sweep.placed
        return done > turns

    engine.until(far)
    assert engine.requests.blocks.free_blocks < 150
    for name, most in streams.items():
        engine.submit(name, prompt(40, len(name)), max_tokens=most)
    engine.until(lambda: not len(engine.requests) and not engine.trainer.job_ids, seconds=150)
    engine.requests.blocks.check([])
    return engine


@pytest.mark.parametrize(("activations", "turns"), [("save", 3), ("save", 12), ("recompute", 3), ("recompute", 12)])
def test_streams_take_a_steps_memory_and_it_comes_back_to_the_same_weights(tmp_path, oracle, activations, turns):
    streams = dict.fromkeys(("a", "bb", "ccc", "dddd", "eeeee"), 400)  # 28 blocks each
    alone = engine_with_a_step(tmp_path / "alone", {}, activations, turns)
    beside = engine_with_a_step(tmp_path / "beside", streams, activations, turns)
    assert moves(alone, "park") == moves(alone, "lean") == 0 < moves(alone, "place")
    assert moves(beside, "park") + moves(beside, "lean") >= 1
    assert moves(beside, "place") == moves(alone, "place") + moves(beside, "park")
    assert beside.counters["coserve_preemptions_total"] == 0, "training gives way first"
    for name, most in streams.items():
        assert_greedy_equal(oracle, prompt(40, len(name)), beside.tokens(name))
        assert len(beside.tokens(name)) == most
    want, got = trained(alone), trained(beside)
    assert all(torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-5) for name in want)
    assert not [*(tmp_path / "beside").glob("tmp/*")], "a parked step's file is left"


def test_a_row_that_no_memory_holds_fails_its_job_with_the_remedy(tmp_path):
    engine = SteppedEngine(tmp_path, blocks=64, activation_blocks=4)
    write_job(tmp_path, "job", DIGEST, [(prompt(60, 1), prompt(60, 1))], batch_size=1)
    engine.trainer.start("job")
    engine.until(lambda: not engine.trainer.job_ids)
    last = json.loads((tmp_path / "jobs" / "job" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["data"]["code"]) == ("failed", "out_of_memory")
    assert "A row of 60 tokens" in last["message"] and "--activation-memory" in last["message"]


def test_a_disk_without_room_costs_the_step_and_not_the_streams(tmp_path, oracle, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    streams = dict.fromkeys(("a", "bb", "ccc", "dddd", "eeeee"), 400)
    engine = engine_with_a_step(tmp_path / "e", streams, "recompute", 6)
    for name in streams:
        assert_greedy_equal(oracle, prompt(40, len(name)), engine.tokens(name))
    assert trained(engine)
    lines = (tmp_path / "e" / "jobs" / "job" / "events.jsonl").read_text().splitlines()
    assert any(json.loads(line)["kind"] == "warning" for line in lines), "the step began anew, and the job says so"


def test_memory_that_runs_out_when_a_step_gets_its_blocks_costs_the_step(tmp_path, monkeypatch):
    """Its units are in the same plan, and have nothing to run on."""
    place, faults = ActivationStore.__init__, [1]

    def first_fails(self, *arguments) -> None:
        if faults:
            faults.pop()
            raise MemoryError
        place(self, *arguments)

    monkeypatch.setattr(ActivationStore, "__init__", first_fails)
    engine = engine_with_a_step(tmp_path / "e", {"a": 20}, "recompute", 3)
    assert not faults and trained(engine) and len(engine.tokens("a")) == 20
