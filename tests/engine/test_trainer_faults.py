"""What a job does when its sweep is lost, or its side work raises: real jobs, model and scheduler, driven by hand."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from engine_process import write_job
from gradient_oracle import engine_model
from peft_oracle import training_rows
from safetensors.torch import load_file

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.policy import Scheduler
from coserve.scheduler.state import SchedulerState
from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.adapters import AdapterBook
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.live_sweeps import LiveSweeps
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.requests import RequestBook
from coserve.server.engine.runner import YIELDED, Runner
from coserve.server.engine.shapes import layer_shapes
from coserve.server.engine.shares import Shares
from coserve.server.engine.trainer import Trainer
from coserve.server.training.fault import OUT_OF_MEMORY, Fault

pytestmark = pytest.mark.usefixtures("one_thread")

DIGEST = "b" * 64
MEMORY = Fault(OUT_OF_MEMORY, "the server's memory ran out")


class Driver:
    """The training half of an engine: `turn` is one iteration, after which the test may do what it likes."""

    def __init__(self, data_dir: Path, jobs: list[str], blocks: int = 256, **options) -> None:
        self.data_dir = data_dir
        model = engine_model("llama", torch.float32)
        self.pool = AdapterPool.of(2**22, 8 * model.hidden_size, torch.float32)
        values = {"model": "base", "data_dir": data_dir, "socket_path": "", "dtype": "float32", "train_window": 64}
        self._blocks = BlockManager(blocks, 16)
        cache = KVCache(layer_shapes(model), blocks, 16, torch.float32)
        resolved = EngineOptions(**{**values, **options})
        self.live = LiveSweeps(model, resolved, self._blocks, cache, blocks)
        self.trainer = Trainer(
            model, self.pool, self.live, resolved, DIGEST, "base", Shares(4, 4), served=lambda _: 0.0
        )
        requests = RequestBook(self._blocks, 1.0, 1.0)
        adapters = AdapterBook(self.pool, AdapterLoader(lambda path: {}, 0), data_dir)
        self.runner = Runner(model, cache, requests, adapters)
        self.scheduler = Scheduler(SchedulerConfig(itl_seconds=0.01))
        for job in jobs:
            self.trainer.start(job)

    def turn(self) -> None:
        self.trainer.tick()
        state = SchedulerState(
            time.monotonic(), (), self.trainer.states(), free_blocks=self._blocks.free_blocks, block_size=16,
            max_running=1, max_adapters=1, activation_blocks=self.live.most_blocks,
        )  # fmt: skip
        plan = self.scheduler.plan(state)
        self.trainer.rearrange(plan)
        if plan.empty:
            time.sleep(0.001)
            return
        outcome = self.runner.run(plan, self.trainer.sweeps)
        self.trainer.lose(outcome.lost)

    def until(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            self.turn()

    def run(self) -> None:
        self.until(lambda: not self.trainer.job_ids)

    def sweep_of(self, job: str):
        """(id, sweep) of a live sweep with rows of a job, None if it has none."""
        found = [(i, s) for i, s in self.trainer.sweeps.items() if any(step.job_id == job for step in s.steps)]
        return found[0] if found else None

    def in_backward(self, job: str) -> bool:
        found = self.sweep_of(job)
        return found is not None and found[1].forward_done and found[1].layer == 1

    def events(self, job: str) -> list[dict]:
        text = (self.data_dir / "jobs" / job / "events.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def final(self, job: str) -> dict[str, torch.Tensor]:
        last = self.events(job)[-1]
        assert last["kind"] == "finished", last
        return load_file(self.data_dir / last["data"]["path"] / "adapter_model.safetensors")


def prepare(data_dir: Path, **jobs) -> list[str]:
    for seed, (name, settings) in enumerate(jobs.items()):
        write_job(data_dir, name, DIGEST, training_rows(24, seed), **settings)
    return list(jobs)


def close(got: dict, want: dict) -> bool:
    return all(torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-5) for name in want)


def calm(tmp_path: Path, **jobs) -> dict[str, dict]:
    driver = Driver(tmp_path / "calm", prepare(tmp_path / "calm", **jobs))
    driver.run()
    return {job: driver.final(job) for job in jobs}


@pytest.mark.parametrize("fault", [MEMORY, YIELDED], ids=["out of memory", "yielded"])
def test_a_step_whose_sweep_is_lost_is_run_again_and_counts_once(tmp_path, fault):
    want = calm(tmp_path, a={}, b={"r": 3, "alpha": 6})
    driver = Driver(tmp_path / "d", prepare(tmp_path / "d", a={}, b={"r": 3, "alpha": 6}))
    driver.until(lambda: driver.in_backward("a"))
    number, sweep = driver.sweep_of("a")
    jobs = {step.job_id for step in sweep.steps}
    sweep.release()
    driver.trainer.lose({number: fault})
    assert driver.sweep_of("a") is None
    driver.until(lambda: driver.sweep_of("a") is not None)
    number, again = driver.sweep_of("a")
    assert [step.job_id for step in again.steps] == ["a"] and again.lean and not again.save and again.rows < sweep.rows
    assert next(state.window for state in driver.trainer.states() if state.sweep_id == number) == 16
    driver.run()
    for job in ("a", "b"):
        assert close(driver.final(job), want[job])
        steps = [event["data"]["step"] for event in driver.events(job) if event["kind"] == "step"]
        assert steps == [1, 2, 3]
        warnings = [event for event in driver.events(job) if event["kind"] == "warning"]
        assert len(warnings) == (job in jobs)
    assert driver.pool.bytes_used == 0


def test_generation_that_takes_the_memory_again_and_again_delays_a_job_and_never_fails_it(tmp_path):
    driver = Driver(tmp_path, prepare(tmp_path, a={"n_epochs": 1}))
    for _ in range(3):
        driver.trainer._rest = 1000.0
        driver.until(lambda: driver.sweep_of("a") is not None)
        number, sweep = driver.sweep_of("a")
        sweep.release()
        driver.trainer.lose({number: YIELDED})
        driver.trainer.tick()
        assert not driver.trainer.sweeps and driver.trainer._rest_until > time.monotonic(), "it rests"
        driver.trainer._rest_until = 0.0
    driver.run()
    assert driver.events("a")[-1]["kind"] == "finished"


def test_a_unit_that_raises_twice_in_a_step_ends_its_job_alone(tmp_path):
    want = calm(tmp_path, bad={}, good={})
    driver = Driver(tmp_path / "d", prepare(tmp_path / "d", bad={}, good={}))
    for _ in range(2):
        driver.until(lambda: driver.in_backward("bad"))
        driver.sweep_of("bad")[1].release()  # from here on its units raise: what they need is gone
        driver.until(lambda: driver.sweep_of("bad") is None)
    driver.run()
    last = driver.events("bad")[-1]
    assert (last["kind"], last["data"]["code"]) == ("failed", "internal_error")
    assert close(driver.final("good"), want["good"])
    assert driver.pool.bytes_used == 0


def test_memory_that_runs_out_in_different_steps_does_not_add_up(tmp_path):
    driver = Driver(tmp_path, prepare(tmp_path, a={}))
    for step in (1, 2, 3):
        driver.until(
            lambda step=step: driver.in_backward("a") and driver.sweep_of("a")[1].steps[0].dropout_key[1] == step
        )
        number, sweep = driver.sweep_of("a")
        sweep.release()
        driver.trainer.lose({number: MEMORY})
    driver.run()
    assert driver.events("a")[-1]["kind"] == "finished"


def test_an_error_in_one_jobs_side_work_ends_that_job_alone(tmp_path):
    """Its first optimizer step does not find the gradients of all its sites."""
    want = calm(tmp_path, bad={}, good={})
    driver = Driver(tmp_path / "d", prepare(tmp_path / "d", bad={}, good={}))
    driver.until(lambda: driver.in_backward("bad"))
    step = next(step for step in driver.sweep_of("bad")[1].steps if step.job_id == "bad")
    sweep = driver.sweep_of("bad")[1]
    driver.until(lambda: sweep.layer == 0)
    del step.grads[next(iter(step.grads))]
    driver.run()
    last = driver.events("bad")[-1]
    assert (last["kind"], last["data"]["code"]) == ("failed", "internal_error")
    assert "KeyError" not in last["message"] and "lora" not in last["message"], "the cause is for the log"
    assert close(driver.final("good"), want["good"])


def test_a_job_whose_folder_goes_while_it_trains_ends_alone(tmp_path):
    driver = Driver(tmp_path, prepare(tmp_path, bad={}, good={}))
    driver.until(lambda: driver.in_backward("bad"))
    shutil.rmtree(tmp_path / "jobs" / "bad")
    driver.run()
    driver.final("good")


def test_sweeps_wait_for_the_activations_memory(tmp_path):
    """A step cut in parts because its activations do not fit must not have all its parts under way at once."""
    driver = Driver(tmp_path, prepare(tmp_path, a={"batch_size": 24}), blocks=16, activations="recompute")
    most = [0]

    def done() -> bool:
        most.append(sum(sweep.rows for sweep in driver.trainer.sweeps.values() if sweep.placed))
        return not driver.trainer.job_ids

    driver.until(done)
    driver.final("a")
    assert 60 < max(most) <= driver.live.most_rows == 128
    assert driver.live.blocks == 0
