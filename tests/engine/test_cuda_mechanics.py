"""What only a CUDA device can show: no waiting inside an iteration, graphs, loads beside the iterations."""

from __future__ import annotations

import pytest
import torch
from peft_oracle import prompt, save_adapter
from stepped_engine import SteppedEngine

from coserve.scheduler.state import Plan

pytestmark = pytest.mark.gpu


@pytest.fixture
def engine(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from coserve.server.engine.decode_graphs import DecodeGraphs
    from coserve.server.engine.triton_backend import TritonBackend

    save_adapter(tmp_path / "a", "llama:mini", 5, seed=1)
    return SteppedEngine(
        tmp_path, architecture="llama:mini", backend=TritonBackend(), device=torch.device("cuda"), itl=60.0,
        graphs_of=lambda model, cache, pool: DecodeGraphs(model, cache, pool, 64),
    )  # fmt: skip


def test_a_decode_iteration_waits_only_at_its_end(engine):
    """torch raises where the host would wait: by the graph, and beside a graph's results that wait to be read."""
    engine.submit("x", prompt(9, 1), engine.ref("a"), max_tokens=12)
    engine.until(lambda: len(engine.tokens("x")) >= 4, seconds=120)  # the graph is captured by now
    runner = engine.engine._runner
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            runner._forward(_load("x"), {}, _outcome())  # what is above it would take the error for the request's
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(runner._pending) == 2


def test_tokens_with_graphs_are_those_without(engine, tmp_path):
    from coserve.server.engine.triton_backend import TritonBackend

    plain = SteppedEngine(
        tmp_path, architecture="llama:mini", backend=TritonBackend(), device=torch.device("cuda"), itl=60.0
    )
    for stepped in (engine, plain):
        for name, adapter in (("x", stepped.ref("a")), ("y", None)):
            stepped.submit(name, prompt(9, ord(name)), adapter, max_tokens=10)
        stepped.until(lambda s=stepped: not len(s.requests), seconds=120)
    assert [engine.tokens(n) for n in "xy"] == [plain.tokens(n) for n in "xy"]
    replays = engine.engine._runner._graphs._replays
    assert replays and all(replay is not None for replay in replays.values())


def test_a_pass_that_waits_is_not_captured_and_nothing_else_is_lost(engine, monkeypatch):
    from coserve.server.engine.decode_graphs import StaticDecode

    run = StaticDecode.run
    monkeypatch.setattr(StaticDecode, "run", lambda static: (static._ids.sum().item(), run(static))[1])
    here = torch.cuda.current_stream()
    engine.submit("x", prompt(9, 1), engine.ref("a"), max_tokens=4)
    engine.until(lambda: not len(engine.requests), seconds=120)
    assert len(engine.tokens("x")) == 4
    assert set(engine.engine._runner._graphs._replays.values()) == {None}
    assert torch.cuda.current_stream() == here and torch.cuda.get_sync_debug_mode() == 0


def test_an_adapter_is_written_beside_the_iterations(engine):
    assert engine.pool._pages._side is not None
    engine.submit("x", prompt(9, 1), engine.ref("a"), max_tokens=2)
    engine.until(lambda: not len(engine.requests), seconds=120)
    assert engine.pool._residents[engine.ref("a").digest].arrival is not None and not engine.pool.arriving
    engine.pool.check()


def _load(request_id: str):
    from coserve.server.engine.relief import Load

    return Load(decodes=Plan(decodes=(request_id,)).decodes)


def _outcome():
    from coserve.server.engine.runner import Outcome

    return Outcome()
