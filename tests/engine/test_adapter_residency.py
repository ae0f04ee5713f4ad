"""Adapters that cannot be read, that wait with a preempted request, that are dropped meanwhile."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from engine_process import write_job
from peft_oracle import assert_greedy_equal, oracle_model, prompt, save_adapter, training_rows
from stepped_engine import DIGEST, ONE_ADAPTER, SteppedEngine
from tiny_models import save_tiny_model

from coserve.server.wire.messages import (
    AdapterChecked,
    AdapterDropped,
    AdapterRef,
    AdaptersPinned,
    CheckAdapter,
    DropAdapter,
    Failed,
    PinAdapters,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    engine = SteppedEngine(tmp_path, blocks=14, pool_bytes=ONE_ADAPTER)
    ref = engine.ref("a")
    engine.submit("old", prompt(60, 1), max_tokens=60)
    engine.submit("new", prompt(60, 2), ref, max_tokens=100)
    new = engine.requests.get("new")
    engine.until(lambda: new.output)
    assert engine.pool.in_flight(ref.digest) == 1
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


def test_streams_take_an_idle_adapters_memory_and_it_comes_back_the_same(tmp_path):
    save_adapter(tmp_path / "a", "llama", 4, seed=1)
    engine = SteppedEngine(tmp_path, blocks=10, pool_bytes=ONE_ADAPTER)
    ref = engine.ref("a")
    engine.submit("first", prompt(20, 1), ref)
    engine.until(lambda: not len(engine.requests))
    assert engine.pool.resident() == [ref.digest]
    engine.submit("long", prompt(40, 2), max_tokens=200)  # 15 of 17 blocks
    engine.until(lambda: not len(engine.requests))
    assert engine.pool.resident() == [] and engine.counters["coserve_preemptions_total"] == 0
    engine.submit("again", prompt(20, 1), ref)
    engine.until(lambda: not len(engine.requests))
    model = oracle_model(save_tiny_model(tmp_path / "model", "llama"), tmp_path / "a")
    for name in ("first", "again"):
        assert_greedy_equal(model, prompt(20, 1), engine.tokens(name))
    assert len(engine.tokens("again")) == 16 and len(engine.tokens("long")) == 200
    engine.requests.blocks.check([], [resident.units for resident in engine.pool._residents])


@pytest.mark.parametrize("whose", ["a request's", "a job's"])
def test_an_adapter_that_waits_for_memory_gets_it_from_streams_that_never_stop_coming(tmp_path, whose):
    save_adapter(tmp_path / "a", "llama", 4, seed=1)
    write_job(tmp_path, "job", DIGEST, training_rows(4), batch_size=4)
    engine = SteppedEngine(tmp_path, blocks=30, pool_bytes=ONE_ADAPTER)
    ref, sent, waited = engine.ref("a"), 0, []

    def keep_busy() -> bool:
        """More requests of the base model than all of the memory holds, always."""
        nonlocal sent
        while len(engine.requests) < 16:
            engine.submit(f"r{sent}", prompt(40, sent), max_tokens=20 + sent % 30)
            sent += 1
        waited.append(engine.engine._outlook.now().adapter_blocks)
        return sent > 24

    # They hold memory that adapters may have.
    engine.until(lambda: keep_busy() and engine.requests.blocks.free_blocks < 7)
    if whose == "a job's":
        engine.trainer.start("job")
        engine.until(lambda: keep_busy() and not engine.trainer.job_ids, seconds=10)
        assert json.loads((tmp_path / "jobs/job/events.jsonl").read_text().splitlines()[-1])["kind"] == "finished"
    else:
        engine.submit("a", prompt(20, 1), ref)
        engine.until(lambda: keep_busy() and engine.requests.get("a") is None, seconds=10)
        assert len(engine.tokens("a")) == 16
    assert max(waited) >= 7, "it had to wait"
    engine.until(lambda: not len(engine.requests))
    engine.pool.check()


def test_a_large_adapter_gets_its_turn_among_small_ones_that_never_stop(tmp_path):
    for i in range(4):
        save_adapter(tmp_path / f"a{i}", "llama", 4, seed=i)
    save_adapter(tmp_path / "large", "llama", 32, seed=9)
    probe = SteppedEngine(tmp_path)
    small, large = [probe.ref(f"a{i}") for i in range(4)], probe.ref("large")
    probe.submit("r", prompt(5, 0), large)
    outcome(probe, "r")
    engine = SteppedEngine(tmp_path, pool_bytes=probe.pool.bytes_used + probe.pool.bytes_used // 8)
    sent = 0

    def keep_busy() -> bool:
        """Requests of three small adapters, always."""
        nonlocal sent
        while len(engine.requests) < 4:
            engine.submit(f"r{sent}", prompt(5, sent), small[sent % 4], max_tokens=20)
            sent += 1
        return sent > 8

    engine.until(keep_busy)
    engine.submit("large", prompt(5, 1), large, max_tokens=4)
    engine.until(lambda: keep_busy() and engine.requests.get("large") is None)
    assert len(engine.tokens("large")) == 4
    engine.until(lambda: not len(engine.requests))
    engine.pool.check()


def pinned(engine: SteppedEngine, call: int, *refs) -> dict[str, str]:
    """Pin these and no others; what was refused."""
    engine.intake._handlers[PinAdapters](PinAdapters(call, refs))
    engine.until(lambda: any(isinstance(m, AdaptersPinned) and m.call_id == call for m in engine.socket.sent))
    return next(m.refused for m in engine.socket.sent if isinstance(m, AdaptersPinned) and m.call_id == call)


def test_pinned_adapters_stay_while_others_come_and_go(tmp_path):
    for i in range(8):
        save_adapter(tmp_path / f"a{i}", "llama", 4, seed=i)
    probe = SteppedEngine(tmp_path)
    refs = [probe.ref(f"a{i}") for i in range(8)]
    probe.submit("r", prompt(5, 0), refs[0])
    outcome(probe, "r")
    size = probe.pool.bytes_used
    engine = SteppedEngine(tmp_path, pool_bytes=4 * size)
    pool, (first, second, third) = engine.pool, refs[:3]
    assert pinned(engine, 1, first, second) == {}
    assert {first.digest, second.digest} <= set(pool.resident()), "they come without a request"
    refused = pinned(engine, 2, first, second, third)
    assert list(refused) == [third.digest] and "half of the adapter memory" in refused[third.digest]
    for i, ref in enumerate(refs):
        engine.submit(f"r{i}", prompt(5, i), ref, max_tokens=4)
    for i in range(8):
        assert outcome(engine, f"r{i}") is None
        assert {first.digest, second.digest} <= set(pool.resident())
    pool.check()
    # A version that the pins leave no room for is told so instead of waiting for ever.
    save_adapter(tmp_path / "wide", "llama", 12, seed=9)
    engine.submit("wide", prompt(5, 1), engine.ref("wide"))
    assert outcome(engine, "wide").code == "adapter_unavailable"
    # Deleted while it is pinned: nothing waits for it, and it goes when the gateway says that it is no longer pinned.
    engine.intake._handlers[DropAdapter](DropAdapter(7, first.digest))
    engine.until(lambda: any(isinstance(m, AdapterDropped) for m in engine.socket.sent))
    assert pinned(engine, 3, second) == {}
    assert first.digest not in pool and second.digest in pool
    engine.submit("wide again", prompt(5, 1), engine.ref("wide"))
    assert outcome(engine, "wide again") is None
    assert pinned(engine, 4) == {}
    pool.unload(second.digest)
    pool.check()


def test_a_pin_that_cannot_be_read_is_refused_and_others_stand(tmp_path):
    save_adapter(tmp_path / "a", "llama", 4, seed=1)
    engine = SteppedEngine(tmp_path)
    refused = pinned(engine, 1, AdapterRef("f" * 64, "gone"), engine.ref("a"))
    assert list(refused) == ["f" * 64] and "could not be read" in refused["f" * 64]
    assert engine.ref("a").digest in engine.pool


def test_requests_of_pinned_adapters_run_together(tmp_path):
    """Pins that nobody uses take room from others, those that are used do not count twice."""
    for i in range(4):
        save_adapter(tmp_path / f"a{i}", "llama", 4, seed=i)
    probe = SteppedEngine(tmp_path)
    refs = [probe.ref(f"a{i}") for i in range(4)]
    probe.submit("r", prompt(5, 0), refs[0])
    outcome(probe, "r")
    engine = SteppedEngine(tmp_path, pool_bytes=4 * probe.pool.bytes_used)
    pinned(engine, 1, refs[0], refs[1])
    assert engine.adapters.capacity([refs[0].digest, refs[1].digest]) >= 2
    for i, ref in enumerate(refs):
        engine.submit(f"r{i}", prompt(5, i), ref, max_tokens=30)
    engine.until(lambda: all(engine.requests.get(f"r{i}").output for i in range(2)))
    assert all(len(engine.tokens(f"r{i}")) < 30 for i in range(2))
    engine.until(lambda: not len(engine.requests))
    assert len(engine.pool.resident()) == 4
    assert engine.adapters.capacity() == 2, "the pins that nobody uses"
    assert engine.adapters.capacity([refs[0].digest]) == 3
    assert engine.adapters.capacity([ref.digest for ref in refs]) == 4


def test_an_idle_engine_asks_again_soon_while_an_adapter_comes(tmp_path):
    """The loop sleeps for as long as it may between two turns without work, so each turn must say that news is near."""
    save_adapter(tmp_path / "a", "llama", 4, seed=1)
    engine = SteppedEngine(tmp_path)
    engine.submit("r", prompt(10, 1), engine.ref("a"))
    turns = []
    while not engine.tokens("r"):
        if not engine.engine.step():
            turns.append(engine.adapters.moving)
    assert turns and all(turns)
    engine.until(lambda: engine.requests.get("r") is None)
    engine.engine.step()
    assert not engine.adapters.moving


def problem_of(engine: SteppedEngine, folder: str) -> str | None:
    """What is said of an upload."""
    engine.intake._handlers[CheckAdapter](CheckAdapter(1, folder))
    engine.until(lambda: any(isinstance(m, AdapterChecked) for m in engine.socket.sent))
    answer = next(m for m in engine.socket.sent if isinstance(m, AdapterChecked))
    engine.socket.sent.remove(answer)
    assert answer.param == (None if answer.error is None else "file")
    return answer.error


def test_an_adapter_larger_than_the_pool_is_refused_with_the_rank_that_would_fit(tmp_path):
    save_adapter(tmp_path / "large", "llama", 64, seed=1)
    engine = SteppedEngine(tmp_path, pool_bytes=300_000)
    pool = engine.pool
    widths = [width for site in engine.model.sites for width in (site.in_features, site.out_features)]
    pages = sum(-(-64 * width // pool.page_elements) for width in widths)
    told = problem_of(engine, "large")
    assert f"needs {pages * pool.page_bytes} bytes" in told and f"has {pool.room.whole * pool.page_bytes};" in told
    rank = int(re.search(r"use rank (\d+), the largest", told)[1])
    for other, fits in ((rank, True), (rank + 1, False)):
        save_adapter(tmp_path / f"r{other}", "llama", other, seed=1)
        assert (problem_of(engine, f"r{other}") is None) == fits
    engine.submit("r", prompt(5, 1), engine.ref("large"))
    failed = outcome(engine, "r")
    assert (failed.code, failed.message) == ("adapter_invalid", f"the adapter cannot be loaded: {told}")
    none = SteppedEngine(tmp_path, pool_bytes=pool.page_bytes)
    assert "no rank fits at these modules, or start" in problem_of(none, "large")
