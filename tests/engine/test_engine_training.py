"""Whole jobs in a real engine process: equal to PEFT with torch's AdamW, and the same bits after kills and pauses."""

from __future__ import annotations

import pytest
import torch
from engine_process import EngineProcess, write_job
from peft_oracle import distance, peft_loop, training_rows
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from coserve.server.wire.messages import StartJob, StopJob

STEPS = 20


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gemma3_text")


def final_tensors(engine, record):
    return load_file(engine.data_dir / record["data"]["path"] / "adapter_model.safetensors")


def test_a_job_beside_a_stream_equals_peft_with_adamw(model_folder, tmp_path):
    rows = training_rows(8 * STEPS)
    initial, reference = peft_loop(model_folder, rows, r=4, alpha=8, seed=3, step_rows=8, steps=STEPS)
    with EngineProcess(model_folder, tmp_path, train_window=16, slo_itl_ms=100) as engine:
        digest = engine.ready.base_digest
        for name, batch, accumulation in (("job8x1", 8, 1), ("job4x2", 4, 2)):
            write_job(tmp_path, name, digest, rows, seed=3, batch_size=batch, gradient_accumulation_steps=accumulation)
            for i in range(3):
                engine.submit(f"{name}-{i}", list(range(3, 20)), max_tokens=400)
            record = engine.run_job(name)
            assert record["kind"] == "finished", record
            assert distance(final_tensors(engine, record), initial, reference) <= 1e-3
        kinds = [it["tokens"] for it in engine.iterations()]
    assert any(t["decode"] and t["train_forward"] for t in kinds)
    assert any(t["decode"] and t["train_backward"] for t in kinds)


def test_two_jobs_and_a_cancelled_third_equal_their_solo_runs(model_folder, tmp_path):
    rows = {name: training_rows(40, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    ranks = {"a": 3, "b": 17, "c": 5}
    with EngineProcess(model_folder, tmp_path, train_window=16, slo_itl_ms=100) as engine:
        digest, finals = engine.ready.base_digest, {}
        for run in ("solo", "shared"):
            for name in ranks:
                write_job(tmp_path, f"{run}-{name}", digest, rows[name], r=ranks[name], alpha=2 * ranks[name])
        for name in ("a", "b"):
            finals[name] = final_tensors(engine, engine.run_job(f"solo-{name}"))
        for name in ranks:
            engine.send(StartJob(f"shared-{name}", "t"))
        engine.wait_job("shared-c", ("step",))
        engine.send(StopJob("shared-c", pause=False))
        ends: dict[str, dict] = {}

        def over(message):
            record = getattr(message, "record", None)
            if record and record["kind"] in ("finished", "failed", "cancelled"):
                ends[message.job_id] = record
            return len(ends) == 3

        engine.pump(over)
        assert ends["shared-c"]["kind"] == "cancelled"
        for name in ("a", "b"):
            got = final_tensors(engine, ends[f"shared-{name}"])
            zero = {n: torch.zeros_like(t) for n, t in got.items()}
            assert distance(got, zero, finals[name]) <= 1e-3


@pytest.mark.faults
def test_kills_and_pauses_do_not_change_a_bit(model_folder, tmp_path):
    rows = training_rows(8 * STEPS)
    with EngineProcess(model_folder, tmp_path, train_window=16, slo_itl_ms=100) as engine:
        digest = engine.ready.base_digest
        for name in ("calm", "killed", "paused"):
            write_job(tmp_path, name, digest, rows, checkpoint_every=4)
        calm = final_tensors(engine, engine.run_job("calm"))

        engine.send(StartJob("killed", "t"))
        for steps in (3, 9):
            engine.pump(lambda m, steps=steps: getattr(m, "record", {}).get("data", {}).get("step", 0) >= steps)
            engine.kill()
            engine.start()
            engine.send(StartJob("killed", "t"))
        killed = final_tensors(engine, engine.wait_job("killed", ("finished", "failed")))

        for pause in range(5):
            engine.send(StartJob("paused", "t"))
            engine.pump(lambda m, p=pause: getattr(m, "record", {}).get("data", {}).get("step", 0) >= 3 * p + 1)
            engine.send(StopJob("paused", pause=True))
            engine.wait_job("paused", ("paused",))
        paused = final_tensors(engine, engine.run_job("paused"))
    for name, tensor in calm.items():
        assert torch.equal(tensor, killed[name]), f"{name} differs after kills"
        assert torch.equal(tensor, paused[name]), f"{name} differs after pauses"
