"""Requests past their deadline, and requests that were cancelled: gone from the very next plan, and nobody pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_states import chunks, prompt, request, state, stream

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import SchedulerState

NOW = 100.0
ANYWHERE = [stream("s1"), prompt("p1", 16, 40, blocks=3), request("w1")]


def scheduler() -> Scheduler:
    return Scheduler(SchedulerConfig(itl_seconds=1e6))


def rows(plan: object) -> set[str]:
    return {*plan.decodes, *chunks(plan)}


@pytest.mark.parametrize("one", ANYWHERE, ids=lambda r: r.request_id)
def test_the_plan_at_its_deadline_ends_a_request_wherever_it_stands(one) -> None:
    others = stream("s2"), request("w3")
    before = scheduler().plan(state(replace(one, deadline=NOW + 0.01), *others))
    assert not before.expired and rows(before) == {one.request_id, "s2", "w3"}
    due = scheduler().plan(state(replace(one, deadline=NOW), *others))
    assert due.expired == (one.request_id,) and one.request_id not in rows(due) and "s2" in due.decodes
    alone = scheduler().plan(state(replace(one, deadline=NOW - 5.0)))
    assert alone.empty and alone.expired == (one.request_id,) and not alone.preempt and not alone.unservable


def test_nobody_steps_back_or_is_refused_for_blocks_that_the_next_state_has() -> None:
    late = stream("s1", 33, deadline=NOW)
    starved = scheduler().plan(state(late, stream("s2", 33, blocks=2), stream("s3"), free=0))
    assert (starved.expired, starved.preempt, starved.unservable, starved.decodes) == (("s1",), (), (), ("s3",))
    idle = scheduler().plan(state(late, request("w2", total_tokens=64), free=2))
    assert idle.expired == ("s1",) and not idle.unservable and not idle.prefills
    stuck = scheduler().plan(state(late, prompt("p2", 32, 64, blocks=2), free=0))
    assert stuck.expired == ("s1",) and not stuck.unservable and not stuck.preempt


def test_a_deadline_of_one_that_waits_without_blocks_holds_nobody_up() -> None:
    assert rows(scheduler().plan(state(request("w1", deadline=NOW), request("w2")))) == {"w2"}


def test_a_plan_made_ahead_counts_only_if_the_same_requests_expire() -> None:
    planner = scheduler()
    expected = state(stream("s1", deadline=NOW), stream("s2"), now=NOW + 0.2)
    draft = planner.draft(expected)
    assert draft.plan.expired == ("s1",)
    early = planner.plan(replace(expected, now=NOW - 0.1), draft)
    assert early is not draft.plan and set(early.decodes) == {"s1", "s2"}
    assert planner.plan(replace(expected, now=NOW + 0.1), draft) is draft.plan


@pytest.mark.parametrize("one", ANYWHERE, ids=lambda r: r.request_id)
def test_a_cancelled_request_is_gone_from_the_next_plan_whatever_was_planned_ahead(one) -> None:
    planner = scheduler()
    there: SchedulerState = state(one, stream("s2"), request("w3"))
    assert one.request_id in rows(planner.plan(there))
    draft = planner.draft(there)
    gone = replace(there, requests=there.requests[1:])
    plan = planner.plan(gone, draft)
    assert rows(plan) == {"s2", "w3"} and not plan.expired
    assert planner.plan(gone) == plan, "to cancel twice changes nothing"
