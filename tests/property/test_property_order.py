"""Random states, one plan each: in whose order prompts run, whom training makes wait, and that no time is left over.

Memory, places and adapters are ample here, so only promises, counters and time decide. What is expected is worked out
by rules of this file's own; prices are the scheduler's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil, inf

import pytest
from random_states import ITL, NOW, TENANTS, draw_state, draw_sweep, fresh, learned, price, serve, upper

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.plan_features import plan_features
from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.state import (
    BackwardUnit,
    ForwardUnit,
    HeadUnit,
    Plan,
    Prefill,
    RequestState,
    Ride,
    SchedulerState,
    SweepState,
    Unit,
)  # fmt: skip

CONFIG = SchedulerConfig(itl_seconds=ITL, ttft_seconds=2.0, floor_share=0.0, crowd_share=1e6)
MODEL = learned()


def draw(seed: int, config: SchedulerConfig = CONFIG, **sizes: int) -> tuple[Scheduler, SchedulerState]:
    """A state, and a scheduler that has served its tenants unequally, some of them nearly alike."""
    state, r = draw_state(seed, **sizes), random.Random(seed + 1)
    scheduler = fresh(MODEL, config)
    serve(scheduler, state, {t: r.choice((0.0, 0.1, 0.2, 0.3, 2.0)) * r.random() for t in TENANTS})
    return scheduler, state


def due_order(scheduler: Scheduler, state: SchedulerState) -> list[RequestState]:
    """Class by class; of the tenants in the lowest step of counters the one whose first token is due next, late ones
    after those in time; a tenant's own by deadline."""
    overdue: dict[str, float] = {}
    for r in state.requests:
        if r.slo_class == "batch" and not r.decoding and r.ttft_deadline <= NOW:
            overdue[r.tenant] = r.arrived
    served = {t: scheduler.share.served(t) for t in TENANTS}

    def is_first(r: RequestState) -> bool:
        return r.slo_class == "interactive" or r.arrived <= overdue.get(r.tenant, -1.0)

    def due(r: RequestState) -> tuple[float, float]:
        return r.ttft_deadline, r.arrived

    found = []
    for first in (True, False):
        counters = dict(served)
        left = [r for r in state.requests if not r.decoding and is_first(r) is first]
        while left:
            lowest = min(counters[r.tenant] // ITL for r in left)
            level = [r for r in left if counters[r.tenant] // ITL == lowest]
            heads = [min((r for r in level if r.tenant == t), key=due) for t in {r.tenant for r in level}]
            chosen = min(heads, key=lambda r: (r.ttft_deadline <= NOW, *due(r)))
            found.append(chosen)
            left.remove(chosen)
            counters[chosen.tenant] += scheduler.share.cost(chosen)
    return found


def with_tokens(plan: Plan, state: SchedulerState, order: list[RequestState]) -> Plan | None:
    """The plan with one more prompt token; None if there is none."""
    given_to = {p.request_id: p.tokens for p in plan.prefills}
    for r in order:
        if given_to.get(r.request_id, 0) < r.total_tokens - r.computed_tokens:
            given_to[r.request_id] = given_to.get(r.request_id, 0) + 1
            return replace(plan, prefills=tuple(Prefill(*item) for item in given_to.items()))
    return None


def like_the_next(scheduler: Scheduler, plan: Plan, state: SchedulerState, order: list[RequestState]) -> bool:
    """Whether its one prompt needs as many iterations with the largest chunks that fit."""
    (chunk,) = plan.prefills
    left = next(r.total_tokens - r.computed_tokens for r in order if r.request_id == chunk.request_id)
    most = chunk.tokens
    while most < min(left, CONFIG.max_chunk):
        larger = replace(plan, prefills=(Prefill(chunk.request_id, most + 1),))
        if upper(scheduler, larger, state) > plan.budget_seconds:
            break
        most += 1
    return chunk.tokens == -(-left // -(-left // most))


def check_order(seed: int) -> None:
    scheduler, state = draw(seed)
    order = due_order(scheduler, state)
    plan = scheduler.plan(state)
    names = [p.request_id for p in plan.prefills]
    assert names == [r.request_id for r in order[: len(names)]]
    whole = {r.request_id: r.total_tokens - r.computed_tokens for r in order}
    assert all(p.tokens == whole[p.request_id] for p in plan.prefills[:-1]), "one was cut and another one begun"


def slack(order: list[RequestState], plan: Plan, requests_alone: float) -> float:
    """Seconds from now in which the iteration must end so that no first token is late of those that it may carry."""
    tokens = sum(p.tokens for p in plan.prefills)
    found, ahead, before = inf, -tokens, 0
    for r in order:
        if before >= CONFIG.max_chunk:
            break
        before += r.total_tokens - r.computed_tokens
        ahead += r.total_tokens - r.computed_tokens
        more = ceil(ahead / max(tokens, 1)) * requests_alone if ahead > 0 else 0.0
        found = min(found, r.ttft_deadline - NOW - more)
    return found


def progress_after(plan: Plan, sweep: SweepState) -> SweepProgress:
    progress = SweepProgress(sweep)
    for ride in plan.rides:
        if ride.sweep_id == sweep.sweep_id:
            progress.ride(ride.tokens)
    for unit in plan.units:
        if unit.sweep_id == sweep.sweep_id:
            progress.again(unit)
    return progress


def smallest(progress: SweepProgress) -> Iterator[Ride | Unit]:
    """The least that could come next of a sweep."""
    number = progress.state.sweep_id
    if not progress.forward_done:
        if progress.can_ride():
            yield Ride(number, min(8, progress.next_forward()))
        yield ForwardUnit(number, progress.partial_tokens or min(8, progress.next_forward()), 1)
    if rows := progress.next_head(CONFIG.head_rows):
        yield HeadUnit(number, rows, 1)
    if tokens := progress.next_backward():
        yield BackwardUnit(number, min(8, tokens))


def pieces(progress: SweepProgress) -> Iterator[Ride | Unit]:
    """Some of the sizes that could come next, up to a whole unit."""
    for least in smallest(progress):
        if isinstance(least, HeadUnit):
            yield from (replace(least, steps=n) for n in range(1, progress.head_steps_left + 1))
            continue
        whole = progress.next_backward() or progress.next_forward()
        sizes = {whole, *(n for n in (8, 16, 32, 64, 128) if n < whole)}
        yield from (replace(least, tokens=n) for n in ({whole} if progress.partial_tokens else sizes))


def adding(plan: Plan, piece: Ride | Unit) -> Plan:
    if isinstance(piece, Ride):
        return replace(plan, rides=(*plan.rides, piece))
    return replace(plan, units=(*plan.units, piece))


def fits(scheduler: Scheduler, plan: Plan, state: SchedulerState, piece: Ride | Unit, room: float) -> bool:
    """Well inside of `room`: deviations of parts do not add up as those of sums do. With training more is left for
    surprises than with prompts alone."""
    more = price(scheduler, adding(plan, piece), state) - price(scheduler, plan, state)
    if not (plan.rides or plan.units):
        more += scheduler.model.margins.upper("training", 0.0, 0.0)
    return plan.upper_seconds + 1.05 * more + 1e-4 <= room


def promised(scheduler: Scheduler, plan: Plan) -> float:
    """What iterations that train may take of the promise."""
    return max(ITL, plan.budget_seconds) * (CONFIG.training_share if scheduler.share.shared else 1.0)


def check_budget(state: SchedulerState, plan: Plan) -> None:
    """It is the promise, or that of streams that all have looser ones, if nobody else is there or on the way in."""
    due = min((r.itl_deadline - NOW for r in state.requests if r.itl_deadline is not None), default=inf)
    asked = any(r.slo_class == "interactive" and not r.decoding for r in state.requests)
    most = ITL if asked or due == inf else CONFIG.arrival_share * CONFIG.ttft_seconds
    assert plan.budget_seconds == pytest.approx(min(due, most))


def mean(scheduler: Scheduler, plan: Plan, piece: Ride | Unit, state: SchedulerState) -> float:
    """Seconds that a piece adds."""
    both = (plan_features(p, state, scheduler.traits) for p in (adding(plan, piece), plan))
    with_it, without = (sum(seconds for seconds, _ in scheduler.model.parts(features)) for features in both)
    return with_it - without


def check_starts(plan: Plan) -> None:
    """Units of an iteration that keeps to its upper estimate are never left for later, and what is owed never is."""
    assert len(plan.unit_starts) == (len(plan.units) if plan.decodes else 0)
    seconds = [plan.budget_seconds - start for start in plan.unit_starts]
    for i, start in enumerate(plan.unit_starts):
        assert start == inf or start >= plan.upper_seconds - sum(seconds[i:]) - 1e-9
    if plan.unit_starts and plan.upper_seconds > plan.budget_seconds + 1e-9:
        assert plan.unit_starts[0] == inf


def check_beside(seed: int) -> None:
    """Training fills what requests leave, takes nothing of theirs and makes nobody late."""
    scheduler, state = draw(seed)
    alone, _ = draw(seed)
    order = due_order(scheduler, state)
    plan, bare = scheduler.plan(state), alone.plan(replace(state, sweeps=()))
    check_budget(state, plan)
    runnable = state.requests or any(not SweepProgress(s).done for s in state.sweeps)
    assert bool(runnable) is not plan.empty
    assert (plan.decodes, plan.prefills) == (bare.decodes, bare.prefills), "training changed what requests get"
    more = with_tokens(bare, state, order)
    tokens = sum(p.tokens for p in bare.prefills)
    if more is not None and tokens < CONFIG.max_chunk:
        full = upper(alone, more, state) > 0.999 * bare.budget_seconds
        assert plan.decodes and (full or like_the_next(alone, bare, state, order)), "one more prompt token fits"
    if not (plan.decodes or plan.prefills):
        return
    ends = slack(order, bare, bare.upper_seconds)
    level = min((scheduler.share.served(r.tenant) for r in order[: len(plan.prefills)]), default=inf)
    behind = [s for s in state.sweeps if scheduler.share.served(s.jobs[0].tenant) <= level]
    room = min(plan.budget_seconds, ends, promised(scheduler, plan))
    if plan.rides or plan.units:
        assert plan.upper_seconds <= room + 1e-9, "training makes somebody late"
        assert {t.sweep_id for t in (*plan.rides, *plan.units)} <= {s.sweep_id for s in behind}, "somebody waits for it"
    check_starts(plan)
    for sweep in behind:
        for piece in smallest(progress_after(plan, sweep)):
            assert not fits(scheduler, plan, state, piece, room), f"{piece} fits"


def check_alone(seed: int) -> None:
    """Where only training is there it fills the iteration up to its next unit, in order."""
    scheduler, state = draw(seed)
    state = replace(state, requests=())
    plan = scheduler.plan(state)
    by_counter = sorted(state.sweeps, key=lambda s: scheduler.share.served(s.jobs[0].tenant))
    order = sorted(by_counter, key=lambda s: s.jobs[0].priority == "low")
    left = [p for p in (progress_after(plan, s) for s in order) if not p.done]
    assert not plan.empty or not left
    if not left or len(plan.units) >= CONFIG.max_units:
        return
    following = left[0]
    assert all(t.sweep_id in [s.sweep_id for s in order[: order.index(following.state) + 1]]
               for t in (*plan.rides, *plan.units)), "a later one went on before it"  # fmt: skip
    rows = following.next_head(CONFIG.head_rows)
    number = following.state.sweep_id
    if rows and (following.head_partial_rows or not following.partial_tokens):
        piece: Ride | Unit = HeadUnit(number, rows, following.head_steps_left)
    elif following.partial_tokens:
        piece = ForwardUnit(number, following.partial_tokens, following.state.layers - following.partial_layer)
    elif not following.forward_done:
        if plan.rides or not following.can_ride():
            return  # one ride an iteration, so that cuts do not depend on time
        piece = Ride(number, following.next_forward())
    else:
        piece = BackwardUnit(number, following.next_backward())
    assert not fits(scheduler, plan, state, piece, promised(scheduler, plan)), f"{piece} fits"


def check_floor(seed: int) -> None:
    """A debt is paid inside the budget wherever the decodes leave much room, and else by one unit that it covers."""
    scheduler, state = draw(seed, replace(CONFIG, floor_share=0.1))
    r = random.Random(seed)
    sweeps = scheduler.share.order_sweeps(state.sweeps)
    scheduler._training.floor.settle(sweeps, 10.0 * r.random(), {})
    debts = {s.sweep_id: owed for s, owed in scheduler._training.floor.debts(sweeps)}
    plan = scheduler.plan(state)
    check_starts(plan)
    forced = sum(p.tokens for p in plan.prefills) <= CONFIG.min_chunk  # by a first token that would be late
    if not plan.decodes or not (plan.rides or plan.units) or plan.upper_seconds <= plan.budget_seconds + 1e-9:
        return
    (piece,) = (*plan.rides, *plan.units)
    assert piece.sweep_id in debts
    bare = replace(plan, rides=(), units=(), prefills=())
    (sweep,) = (s for s in sweeps if s.sweep_id == piece.sweep_id)
    bare = replace(bare, upper_seconds=upper(scheduler, bare, state))
    if not (plan.prefills and forced):
        for other in pieces(SweepProgress(sweep)):
            worth = mean(scheduler, bare, other, state) > 0.2 * plan.budget_seconds
            assert not (worth and fits(scheduler, bare, state, other, plan.budget_seconds)), f"{other} has a place"
        without = replace(plan, rides=(), units=())
        assert mean(scheduler, without, piece, state) <= 1.05 * debts[piece.sweep_id] + 1e-4, "more than it is owed"


def check_cancelled(seed: int) -> None:
    """A sweep that is gone, wherever it stood, leaves the plans that there would be without it."""
    r = random.Random(seed)
    alone = r.random() < 0.5  # no other sweep: then the floor has nobody left to owe to
    config = CONFIG if not alone else replace(CONFIG, floor_share=0.1)
    with_it, without = (draw(seed, config)[0] for _ in range(2))
    begins, ends = sorted(r.sample(range(6), 2))
    for turn in range(9):
        state = draw_state(seed + turn, tenants=1)
        if alone and turn <= ends:
            state = replace(state, sweeps=())
        there = state
        if begins <= turn < ends:
            there = replace(state, sweeps=(*state.sweeps, draw_sweep(r, 99, "d")))
        plans = with_it.plan(there), with_it.plan(there), without.plan(state)
        assert plans[0] == plans[1], "a plan is no cause of the next one"
        if not begins <= turn < ends:
            assert plans[0] == plans[2]
        for scheduler, plan, seen in ((with_it, plans[0], there), (without, plans[2], state)):
            scheduler.account(plan, seen, plan.predicted_seconds)


CHECKS = {"order": check_order, "beside": check_beside, "alone": check_alone, "floor": check_floor,
          "cancelled": check_cancelled}  # fmt: skip


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in CHECKS.items()])
def test_two_thousand_states(check: Callable[[int], None]) -> None:
    for seed in range(300 if check is check_cancelled else 2000):
        check(seed)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chunk", range(10))
def test_a_hundred_thousand_states(chunk: int) -> None:
    for seed in range(10_000 * (chunk + 1), 10_000 * (chunk + 2)):
        for check in CHECKS.values():
            check(seed)
