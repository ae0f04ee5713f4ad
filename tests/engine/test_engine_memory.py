"""Memory that really runs out in an engine process costs a step, a chunk or a request, and never the process."""

from __future__ import annotations

import pytest
from engine_process import EngineProcess, write_job
from peft_oracle import prompt
from tiny_models import save_tiny_model

from coserve.server.wire.messages import Failed, StartJob, StopJob

MIB = 2**20
# Two models whose tensors are large before the work is: single allocations of 33 MiB and more fail while there is
# still memory for everything small. (oneDNN's compiler must not be what fails: see docs/faults.md.)
BULKY = {"hidden_size": 32, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 10_000}  # fmt: skip
WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 37 * 16_384,
        "tie_word_embeddings": True}  # fmt: skip

# Freed logits go back to the system at once: the limit is then what the test says it is.
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}

pytestmark = pytest.mark.faults


def rows(count: int, length: int) -> list[tuple[list[int], list[int]]]:
    return [(prompt(length, i), prompt(length, i)) for i in range(count)]


def events(engine: EngineProcess, job_id: str) -> list[dict]:
    return [event.record for event in engine.events if event.job_id == job_id]


def test_a_step_too_large_for_memory_is_run_in_small_parts_or_fails_alone(tmp_path):
    """A product of the first job's window of 1,100 rows takes 34 MiB, as do gradients of the keys of the second's one
    sequence."""
    folder = save_tiny_model(tmp_path / "model", "llama", **BULKY)
    options = {"kv_memory": 16 * MIB, "adapter_memory": 4 * MIB, "train_window": 2048}
    with EngineProcess(folder, tmp_path, **options) as engine:
        pid, digest = engine.pid, engine.ready.base_digest
        write_job(tmp_path, "fits", digest, rows(11, 100), r=2, batch_size=11, n_epochs=2)
        write_job(tmp_path, "never", digest, rows(1, 8800), r=2, batch_size=1)
        alone = engine.generate(prompt(20, 1), max_tokens=60)
        engine.limit_memory(50 * MIB)
        engine.submit("stream", prompt(20, 1), max_tokens=60)
        assert engine.run_job("fits")["kind"] == "finished", engine.log()
        told = [event for event in events(engine, "fits") if event["kind"] == "warning"]
        assert len(told) == 1 and "smaller parts: memory ran out" in told[0]["message"]
        assert [event["data"]["step"] for event in events(engine, "fits") if event["kind"] == "step"] == [1, 2]
        record = engine.run_job("never")
        assert (record["kind"], record["data"]["code"]) == ("failed", "out_of_memory"), engine.log()
        assert "max_length" in record["message"] and "--kv-memory" in record["message"]
        assert engine.finish("stream") == [alone]
        assert engine.generate(prompt(20, 1), max_tokens=60, salt="other") == alone
        assert engine.alive and engine.pid == pid


def test_a_prompt_too_large_for_memory_takes_shorter_chunks_or_fails_alone(tmp_path):
    """The logits of 64 rows take 147 MiB, those of 16 rows 37 MiB, each several times over."""
    folder = save_tiny_model(tmp_path / "model", "llama", **WIDE)
    options = {"max_tokens": 4, "prompt_logprobs": 2, "logprobs": 2}
    with EngineProcess(folder, tmp_path, environment=EXACT, kv_memory=4 * MIB, adapter_memory=4 * MIB) as engine:
        pid, ids = engine.pid, prompt(100, 2)
        engine.submit("whole", ids, **options)
        stream = engine.generate(prompt(20, 1), max_tokens=60)
        whole = engine.finish("whole")
        write_job(tmp_path, "job", engine.ready.base_digest, rows(4, 8), r=2, batch_size=1, n_epochs=100)
        engine.send(StartJob("job", "t"))
        engine.wait_job("job", ("step",))

        engine.limit_memory(200 * MIB)
        engine.submit("chunked", ids, **options)
        assert engine.finish("chunked") == whole, "training gives its memory back first, then the chunks get shorter"
        got, want = (engine.tokens[name][0].prompt_logprobs for name in ("chunked", "whole"))
        assert len(got) == len(want) == len(ids) and got[0] is None
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(got[1:], want[1:], strict=True))
        assert "a packed forward: memory ran out" in engine.log()
        assert engine.wait_job("job", ("step", "failed"))["kind"] == "step", "training goes on"
        engine.send(StopJob("job", pause=True))
        engine.wait_job("job", ("paused",))

        engine.submit("stream", prompt(20, 1), max_tokens=60)
        engine.pump(lambda m: getattr(m, "request_id", "") == "stream")
        engine.limit_memory(32 * MIB)
        engine.submit("never", ids, **options)
        failures = []
        engine.pump(lambda m: isinstance(m, Failed) and not failures.append(m))
        assert (failures[0].request_id, failures[0].code) == ("never", "out_of_memory")
        assert engine.finish("stream") == [stream]
        engine.unlimit_memory()
        engine.submit("again", ids, **options)
        assert engine.finish("again") == whole
        assert engine.alive and engine.pid == pid
