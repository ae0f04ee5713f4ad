"""Plans made ahead: they leave no trace, and count only where what they were made for is what came."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from scheduler_states import prompt, request, state, stream, sweep

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import SchedulerState, SweepJob, TenantLimit

ITL = 0.05


def busy(seed: int, now: float) -> SchedulerState:
    """Tenants, adapters, prompts and jobs that come and go, with too little of everything."""
    rng = random.Random(seed)
    tenants = rng.sample(["t0", "t1", "t2", "t3"], 3)
    requests = []
    for i in range(9):
        make = rng.choice([stream, lambda n, **c: prompt(n, 16, 90, 1, **c), lambda n, **c: request(n, **c)])
        adapter = rng.choice([None, "x", "y", "z"])
        made = make(
            f"r{i}", tenant=rng.choice(tenants), adapter=adapter, slo_class=rng.choice(["batch", "interactive"])
        )
        ready = made.running or rng.random() < 0.7
        deadline = None if made.itl_deadline is None else now + ITL
        requests.append(
            replace(made, adapter_ready=ready, itl_deadline=deadline, ttft_deadline=now + rng.random() - 0.2)
        )
    sweeps = [sweep(i, jobs=(SweepJob(f"j{i}", rng.choice(tenants), 1.0, "normal"),)) for i in range(rng.randint(0, 2))]
    return replace(
        state(*requests, now=now, free=rng.randint(0, 9), running=7), sweeps=tuple(sweeps),
        limits={"t0": TenantLimit(blocks=6)},
    )  # fmt: skip


def test_a_draft_leaves_no_trace():
    """The same calls with drafts between them, which come to nothing, give the same plans, queues and shares."""
    plain, drafting = (Scheduler(SchedulerConfig(itl_seconds=ITL, drain_after=0.2, credit=0.0)) for _ in range(2))
    waits = 0
    for turn in range(120):
        now = 100.0 + 0.05 * turn
        came = busy(turn, now)
        wrong = drafting.draft(busy(1000 + turn, now + 0.01))
        plans = plain.plan(came), drafting.plan(came, wrong if turn % 2 else None)
        assert plans[0] == plans[1]
        drafting.draft(busy(2000 + turn, now + 0.02))
        assert plain.queue(came) == drafting.queue(came)
        waits += any(q.wait_seconds for q in plain.queue(came))
        for scheduler in (plain, drafting):
            scheduler.observe(plans[0], came, 0.01 + 0.001 * (turn % 7))
            drafting.draft(came)
    assert waits > 20
    assert all(plain.share.served(t) == drafting.share.served(t) > 0.0 for t in ("t0", "t1", "t2", "t3"))


def test_a_draft_for_what_came_is_the_plan_and_is_remembered():
    plain, drafting = (Scheduler(SchedulerConfig(itl_seconds=ITL, drain_after=0.2)) for _ in range(2))
    for turn in range(60):
        came = busy(turn, 100.0 + 0.05 * turn)
        draft = drafting.draft(came)
        wanted, made = plain.plan(came), drafting.plan(came, draft)
        assert made is draft.plan and made == wanted
        assert plain.queue(came) == drafting.queue(came)


def learned() -> Scheduler:
    """A scheduler to which nothing is unknown, so that training fills a plan up to the budget."""
    scheduler = Scheduler(SchedulerConfig(itl_seconds=ITL))
    for turn in range(60):
        came = shared(100.0 + turn, ITL)
        plan = scheduler.plan(came)
        seconds = 0.004 + 1e-5 * sum(r.tokens for r in plan.rides)
        parts = {"forward": seconds, **dict.fromkeys(range(len(plan.units)), 0.002)}
        scheduler.observe(plan, came, sum(parts.values()) + 0.001, parts)
    return scheduler


def shared(now: float, left: float, *more) -> SchedulerState:
    """Two streams beside a job, whose tokens are due in `left` seconds."""
    streams = [replace(stream(name), itl_deadline=now + left) for name in ("s1", "s2")]
    done = sweep(forward_tokens=200, head_rows_left=0, stream_tokens=2000, layers=40, backward_layer=39)
    return replace(state(*streams, *more, now=now), sweeps=(replace(done, forward_tokens=2000),))


@pytest.mark.parametrize("came,holds", [
    (shared(200.0, ITL - 0.002), True),
    (shared(203.0, ITL - 0.002), True),  # it is the time that is left that counts
    (shared(200.0, ITL - 0.0021), True),
    (shared(200.0, ITL - 0.004), False),
    (shared(200.0, ITL - 0.002, request("w3")), False),
    (replace(shared(200.0, ITL - 0.002), free_blocks=99), False),
], ids=["as expected", "later", "a little late", "too late", "a prompt came", "a block is gone"])  # fmt: skip
def test_a_draft_holds_as_long_as_the_promise_and_the_state(came, holds):
    scheduler = learned()
    draft = scheduler.draft(shared(200.0, ITL - 0.002))
    assert draft.plan.units and draft.plan.upper_seconds > 0.9 * draft.plan.budget_seconds
    assert (scheduler.plan(came, draft) is draft.plan) == holds


def test_a_draft_is_no_good_once_an_iteration_was_longer_than_its_bound():
    scheduler = learned()
    came = shared(200.0, ITL)
    plan = scheduler.plan(came)
    draft = scheduler.draft(came)
    scheduler.observe(plan, came, 2 * plan.upper_seconds)
    made = scheduler.plan(came, draft)
    assert made is not draft.plan and len(made.units) < len(draft.plan.units)


def test_a_first_token_that_is_nearer_than_expected_takes_its_time_from_training():
    scheduler = learned()
    first = replace(prompt("p3", 0, 40, blocks=3), ttft_deadline=200.03)
    draft = scheduler.draft(shared(200.0, ITL, first))
    assert draft.plan.prefills and draft.plan.units
    assert scheduler.plan(shared(200.0, ITL, first), draft) is draft.plan
    draft = scheduler.draft(shared(200.0, ITL, first))
    assert scheduler.plan(shared(200.01, ITL, first), draft) is not draft.plan
