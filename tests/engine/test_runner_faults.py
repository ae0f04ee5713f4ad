"""A request whose rows raise, or become infinite, fails alone; its neighbours and the engine's process never notice."""

from __future__ import annotations

import pytest
from engine_process import EngineProcess
from peft_oracle import prompt, save_adapter
from safetensors.torch import load_file, save_file
from stepped_engine import SteppedEngine
from tiny_models import save_tiny_model

from coserve.server.wire.messages import AdapterChecked, AdapterRef, CheckAdapter, Failed

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def failures(engine: EngineProcess, count: int) -> dict[str, Failed]:
    found: dict[str, Failed] = {}

    def take(message):
        if isinstance(message, Failed):
            found[message.request_id] = message
        return len(found) == count

    engine.pump(take)
    return found


def test_a_request_that_raises_fails_alone(model_folder, tmp_path):
    """Token 10,000 of 512: the gateway would have refused it, the embedding raises."""
    with EngineProcess(model_folder, tmp_path) as engine:
        pid = engine.pid
        want = [engine.generate(prompt(20, seed), max_tokens=40) for seed in range(3)]
        engine.submit("s0", prompt(20, 0), max_tokens=40, salt="again")
        engine.pump(lambda m: getattr(m, "request_id", "") == "s0")
        for name, ids in (("bad0", [5, 10_000]), ("bad1", [10_000] * 40)):
            engine.submit(name, ids)
        for seed in (1, 2):
            engine.submit(f"s{seed}", prompt(20, seed), max_tokens=40, salt="again")
        failed = failures(engine, 2)
        assert {name: failure.code for name, failure in failed.items()} == {
            "bad0": "internal_error", "bad1": "internal_error"
        }  # fmt: skip
        assert "10000" not in failed["bad0"].message and "IndexError" in engine.log()
        assert engine.finish("s0", "s1", "s2") == want
        assert engine.alive and engine.pid == pid


def save_huge_adapter(folder):
    """Its numbers are finite, what it makes of the model's is not."""
    save_adapter(folder, "llama", 4, seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 1e36 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def test_an_adapter_that_overflows_fails_its_request_alone(model_folder, tmp_path):
    save_huge_adapter(tmp_path / "huge")
    with EngineProcess(model_folder, tmp_path, kv_memory=2**20) as engine:
        pid = engine.pid
        engine.send(CheckAdapter(1, "huge"))
        checked: list[AdapterChecked] = []
        engine.pump(lambda m: isinstance(m, AdapterChecked) and not checked.append(m))
        assert checked[0].error is None, "its numbers are finite"
        ref = AdapterRef(checked[0].digest, "huge")
        want = engine.generate(prompt(60, 0), max_tokens=40)
        engine.submit("beside", prompt(60, 0), max_tokens=40, salt="again")
        for i in range(20):  # as many as it takes to have written every block
            engine.submit(f"bad{i}", prompt(60, i), adapter=ref)
        failed = failures(engine, 20)
        assert {failure.code for failure in failed.values()} == {"adapter_invalid"}
        assert "infinite" in failed["bad0"].message
        assert engine.finish("beside") == [want]
        assert engine.generate(prompt(60, 0), max_tokens=40, salt="third") == want
        assert engine.alive and engine.pid == pid


@pytest.mark.parametrize("fault", ["overflow", "raise"])
def test_an_iteration_that_fails_a_request_is_paid_by_its_tenant(tmp_path, fault):
    """Else a tenant with a broken adapter would always go first. It is learned from where it ran as planned."""
    save_huge_adapter(tmp_path / "huge")
    engine = SteppedEngine(tmp_path)
    scheduler = engine.engine._scheduler
    engine.submit("bad", [5, 10_000] if fault == "raise" else prompt(40, 1), engine.ref("huge"))
    engine.until(lambda: engine.requests.get("bad") is None)
    assert any(isinstance(m, Failed) and m.request_id == "bad" for m in engine.socket.sent)
    assert scheduler.share.served("t") > 0.0
    assert scheduler.model.observations == (fault == "overflow")


def test_an_answer_that_fits_no_message_fails_its_request_alone(tmp_path):
    """3,800 prompt tokens with 512 alternatives each: 24 MB."""
    folder = save_tiny_model(tmp_path / "model", "llama", max_position_embeddings=4096)
    with EngineProcess(folder, tmp_path) as engine:
        pid = engine.pid
        engine.submit("large", prompt(3800, 1), max_tokens=4, prompt_logprobs=512, logprobs=0)
        assert failures(engine, 1)["large"].code == "internal_error"
        assert "WireError" in engine.log()
        assert len(engine.generate(prompt(20, 1), max_tokens=4)) == 4
        assert engine.alive and engine.pid == pid
