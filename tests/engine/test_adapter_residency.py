"""Adapters that cannot be read, that wait with a preempted request, that are dropped meanwhile."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft_oracle import assert_greedy_equal, oracle_model, prompt, save_adapter
from stepped_engine import SteppedEngine
from tiny_models import save_tiny_model

from coserve.server.wire.messages import AdapterDropped, DropAdapter, Failed


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outcome(engine: SteppedEngine, request_id: str) -> Failed | None:
    """Run until a request ends; how it failed."""
    engine.until(lambda: engine.requests.get(request_id) is None)
    return next((m for m in engine.socket.sent if isinstance(m, Failed) and m.request_id == request_id), None)


@pytest.mark.parametrize("damage", ["gone", "file gone", "folder is a file", "torn"])
def test_a_disk_that_fails_is_told_from_an_adapter_that_will_never_do(tmp_path, damage):
    folder = save_adapter(tmp_path / "a", "llama", 4, seed=1)
    engine = SteppedEngine(tmp_path)
    ref = engine.ref("a")
    shutil.copytree(folder, tmp_path / "whole")
    tensors = folder / "adapter_model.safetensors"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "file gone":
        tensors.unlink()
    elif damage == "folder is a file":
        shutil.rmtree(folder)
        folder.write_bytes(b"")
    else:
        tensors.write_bytes(tensors.read_bytes()[:100])
    engine.submit("r", prompt(10, 1), ref)
    failed = outcome(engine, "r")
    for_ever = damage in ("folder is a file", "torn")
    assert failed.code == ("adapter_invalid" if for_ever else "adapter_unavailable")
    assert str(tmp_path) not in failed.message
    shutil.rmtree(folder, ignore_errors=True)
    folder.unlink(missing_ok=True)
    shutil.copytree(tmp_path / "whole", folder)
    engine.submit("again", prompt(10, 1), ref)
    assert outcome(engine, "again") is None, "nothing was remembered"
    assert len(engine.tokens("again")) == 16


def test_a_preempted_request_gives_its_adapters_place_up_and_takes_it_again(tmp_path):
    save_adapter(tmp_path / "a", "llama", 4, seed=1)
    engine = SteppedEngine(tmp_path, blocks=14)
    ref = engine.ref("a")
    engine.submit("old", prompt(60, 1), max_tokens=60)
    engine.submit("new", prompt(60, 2), ref, max_tokens=100)
    new = engine.requests.get("new")
    engine.until(lambda: new.output)
    assert engine.pool.in_flight(ref.digest) == 2, "the running request, and the place kept for who waits for it"
    engine.until(lambda: new.blocks is None)
    assert engine.pool.in_flight(ref.digest) == 0 and not new.acquired
    # Somebody more urgent may have the place; the version itself stays on the disk as long as the request is there.
    engine.pool.unload(ref.digest)
    engine.intake._handlers[DropAdapter](DropAdapter(7, ref.digest))
    engine.until(lambda: new.blocks is not None)
    assert new.acquired and not any(isinstance(m, AdapterDropped) for m in engine.socket.sent)
    engine.until(lambda: not len(engine.requests))
    engine.until(lambda: any(isinstance(m, AdapterDropped) for m in engine.socket.sent))
    assert ref.digest not in engine.pool
    engine.pool.check()
    got = engine.tokens("new")
    assert len(got) == 100
    model = oracle_model(save_tiny_model(tmp_path / "model", "llama"), tmp_path / "a")
    assert_greedy_equal(model, prompt(60, 2), got)
