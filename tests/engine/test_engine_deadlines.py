"""Deadlines in the engine: a sequence is ended at the next iteration, wherever it stands, and gives everything back."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from peft_oracle import prompt
from stepped_engine import SteppedEngine

from coserve.server.wire.messages import Abort, Failed

pytestmark = pytest.mark.usefixtures("one_thread")


def hurry(engine: SteppedEngine, *names: str) -> None:
    """Their time is up."""
    for name in names:
        request = engine.requests.get(name)
        request.message = replace(request.message, deadline=time.monotonic())


def failures(engine: SteppedEngine) -> list[tuple[str, str]]:
    return [(m.request_id, m.code) for m in engine.socket.sent if isinstance(m, Failed)]


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "planned ahead"])
def test_a_queued_and_a_running_one_end_with_the_next_iteration(tmp_path, ahead):
    # 13 blocks: the queued prompt has no room beside the two that run.
    engine = SteppedEngine(tmp_path, blocks=13, pool_bytes=0, ahead=ahead)
    engine.submit("stays", prompt(60, 1), max_tokens=30)
    engine.submit("late", prompt(60, 2), max_tokens=60)
    engine.until(lambda: engine.tokens("late"))
    engine.submit("queued", prompt(100, 3), max_tokens=20)
    engine.engine.step()
    assert engine.requests.get("queued").blocks is None and engine.requests.running == 2
    hurry(engine, "late", "queued")
    said = len(engine.tokens("late"))
    assert engine.engine.step()
    assert failures(engine) == [("late", "deadline_exceeded"), ("queued", "deadline_exceeded")]
    assert engine.requests.ids == ("stays",)
    engine.until(lambda: not len(engine.requests))
    assert len(engine.tokens("late")) == said and len(engine.tokens("stays")) == 30
    engine.requests.blocks.check([])


def test_an_engine_with_nothing_else_ends_them_too_and_goes_on(tmp_path):
    engine = SteppedEngine(tmp_path)
    engine.submit("late", prompt(40, 1), max_tokens=400)
    engine.until(lambda: engine.tokens("late"))
    hurry(engine, "late")
    assert engine.engine.step(), "something was done: the next state is another"
    assert failures(engine) == [("late", "deadline_exceeded")] and not engine.engine.step()
    engine.requests.blocks.check([])


def test_a_cancelled_one_is_gone_before_the_next_plan_queued_or_running(tmp_path):
    engine = SteppedEngine(tmp_path, blocks=13, pool_bytes=0, ahead=True)
    engine.submit("runs", prompt(60, 1), max_tokens=60)
    engine.submit("stays", prompt(60, 2), max_tokens=20)
    engine.until(lambda: engine.tokens("stays"))
    engine.submit("queued", prompt(100, 3), max_tokens=20)
    engine.engine.step()
    said = len(engine.tokens("runs"))
    for name in ("runs", "queued", "runs"):
        engine.intake._abort(Abort(name))
    engine.until(lambda: not len(engine.requests))
    assert (len(engine.tokens("runs")), len(engine.tokens("stays")), engine.tokens("queued")) == (said, 20, [])
    assert not failures(engine)


def test_the_scheduler_is_told_the_deadline_and_the_longest_output(tmp_path):
    engine = SteppedEngine(tmp_path)
    engine.submit("one", prompt(20, 1), max_tokens=77)
    request = engine.requests.get("one")
    request.message = replace(request.message, deadline=5.0)
    told = engine.requests.state(request, 1.0, True)
    assert (told.most_output, told.deadline) == (77, 5.0)
