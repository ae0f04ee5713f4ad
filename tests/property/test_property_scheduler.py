"""Random worlds: whatever arrives, whatever the device's speed, the scheduler's promises hold.

`scheduler_world.World` carries every plan out and checks blocks, places, adapters and unit borders by its own rules;
this file draws the worlds and checks what only whole schedules show. `nightly` runs 100,000 schedules.
"""

from __future__ import annotations

import random
from collections.abc import Container
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_world import Stream, Sweep, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import Plan, SchedulerState, SweepJob, TenantLimit

SEEDS = st.integers(0, 2**32 - 1)
CANCELLED = 0.01  # of the iterations that end with the cancellation of a request, and of a sweep
QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def draw_world(seed: int) -> tuple[World, list[Stream], list[tuple[float, Sweep]]]:
    """A world, its streams to come and its sweeps to come, all from one seed."""
    r = random.Random(seed)
    world = World(
        blocks=r.choice((6, 8, 12, 40)),
        block_size=r.choice((4, 16)),
        max_running=r.choice((1, 2, 3, 8)),
        max_adapters=r.choice((1, 2, 3)),
        itl=r.choice((0.05, 0.15, 0.5)),
        noise=r.choice((0.0, 0.1, 1.0)),
        seed=seed,
        speed=r.choice((0.001, 0.3, 1.0, 3.0)),
    )
    tenants = [(f"t{i}", r.choice((1.0, 1.0, 3.0))) for i in range(r.randint(1, 3))]
    for tenant, _ in tenants:
        if r.random() < 0.3:
            blocks, pages = r.choice((None, 3, world.blocks // 2)), r.choice((None, 1, 2))
            world.limits[tenant] = TenantLimit(blocks, pages)
    world.resident.places = world.max_adapters
    if r.random() < 0.3:
        world.resident.sizes = {a: r.randint(0, world.blocks // 3) for a in "abc"}
    streams, at = [], 0.0
    for i in range(r.randint(0, 6)):
        at += r.choice((0.0, 0.0, 0.05, 0.4)) * world.speed
        outputs = r.randint(1, 6)
        tenant, weight = r.choice(tenants)
        limit = world.limits.get(tenant, TenantLimit())
        adapter = r.choice((None, None, "a", "b", "c"))
        most = world.blocks - world.resident.sizes.get(adapter or "", 0)
        room = world.block_size * min(most, limit.blocks or most)
        streams.append(
            Stream(
                name=f"s{i}",
                arrived=at,
                prompt=r.randint(1, min(90, room - outputs)),
                outputs=outputs,
                slo_class=r.choice(("interactive", "batch")),
                adapter=adapter,
                ttft=r.choice((0.0, 0.2, 2.0)),
                itl=r.choice((None, None, 0.5 * world.itl, 4.0 * world.itl)),
                tenant=tenant,
                weight=weight,
                most=outputs + r.choice((0, 3, 1000)),
                deadline=r.choice((None, None, None, at + r.choice((0.0, 0.1, 1.0)) * world.speed)),
            )
        )
    sweeps = []
    for i in range(r.randint(0, 2)):
        rows = r.randint(1, 150)
        priority = r.choice(("normal", "low"))
        sweep = Sweep(
            number=i,
            rows=rows,
            labels=r.randint(0, rows),
            layers=r.randint(1, 3),
            window=r.choice((1, 7, 64, 256)) if rows < 20 else r.choice((16, 64, 256)),
            backward=r.random() < 0.8,
            priority=priority,
            head_steps=r.choice((1, 2, 5, 32)),
            jobs=tuple(
                SweepJob(f"j{i}{tenant}", tenant, weight, priority)
                for tenant, weight in r.sample(tenants, r.randint(1, len(tenants)))
            ),
        )
        sweeps.append((r.choice((0.0, 0.1, 0.5)) * world.speed, sweep))
    return world, streams, sweeps


def can_run(state: SchedulerState) -> bool:
    """Something could run now: a sweep, or a request with its adapter (all draws fit an empty cache)."""
    return bool(state.sweeps) or any(r.adapter_ready for r in state.requests if r.running)


def check_order(before: SchedulerState, plan: Plan) -> None:
    """No request is admitted past one of its tenant and class without an adapter that is due before it."""
    running = {r.request_id for r in before.requests if r.running}
    named = {p.request_id for p in plan.prefills}
    for newer in (r for r in before.requests if r.request_id in named - running):
        for older in (r for r in before.requests if r.request_id not in plan.expired):
            if older.request_id == newer.request_id:
                break
            alike = (older.slo_class, older.tenant) == (newer.slo_class, newer.tenant)
            if alike and older.ttft_deadline <= newer.ttft_deadline and older.adapter is None and not older.running:
                assert older.request_id in named, f"{newer.request_id} was admitted before {older.request_id}"


def check_classes(before: SchedulerState, plan: Plan, kept_back: Container[str]) -> None:
    """No batch request is admitted past an interactive one without an adapter, but for overdue ones and those of the
    same tenant before them. `kept_back`: requests, or tenants, that wait for something of their own."""
    running = {r.request_id for r in before.requests if r.running}
    named = {p.request_id for p in plan.prefills}
    overdue: dict[str, float] = {}
    for r in before.requests:
        if r.slo_class == "batch" and not r.decoding and r.ttft_deadline <= before.now:
            overdue[r.tenant] = r.arrived
    batch = [
        r for r in before.requests
        if r.request_id in named - running and r.slo_class == "batch" and r.arrived > overdue.get(r.tenant, -1.0)
    ]  # fmt: skip
    for r in before.requests if batch else ():
        if r.slo_class == "interactive" and not r.running and r.adapter is None:
            waits = r.request_id in kept_back or r.tenant in kept_back or r.request_id in plan.expired
            assert r.request_id in named or waits, f"{batch[0].request_id} was admitted before {r.request_id}"


def run(seed: int, schedulers: list[Scheduler], floor: float) -> World:
    """Drive one world to its end with the first scheduler; the others must agree with it."""
    world, streams, sweeps = draw_world(seed)
    report_parts = seed % 2 == 0
    cancels = random.Random(seed)
    idle = 0
    wanted: tuple[str, ...] = ()
    for _ in range(4000):
        while streams and streams[0].arrived <= world.now:
            world.streams.append(streams.pop(0))
        world.sweeps += [s for at, s in sweeps if at <= world.now]
        sweeps = [(at, s) for at, s in sweeps if at > world.now]
        if not (streams or sweeps or world.streams or world.sweeps):
            return world
        world.load_adapter(wanted)
        state = world.state()
        plans = [s.plan(state) for s in schedulers]
        assert all(p == plans[0] for p in plans[1:]), "the same calls gave different plans"
        plan = plans[0]
        wanted = plan.adapters
        if plan.empty and plan.expired:
            world.expire(plan.expired)
            continue
        if plan.empty:
            assert not can_run(state), "an empty plan although something can run"
            idle += bool(world.streams)  # else it waits for who is still to come
            assert idle < 200, "nothing runs any more"
            world.now += 0.01
            continue
        idle = 0
        check_order(state, plan)
        check_classes(state, plan, schedulers[0]._admission.kept_back)
        due = [r.itl_deadline for r in state.requests if r.request_id in plan.decodes and r.itl_deadline is not None]
        assert not due or plan.budget_seconds <= min(due) - state.now + 1e-9
        training = bool(plan.rides or plan.units)
        if floor == 0.0 and training and (plan.decodes or plan.prefills):
            assert plan.upper_seconds <= plan.budget_seconds + 1e-9, "training went over the budget"
        parts = world.parts(plan) if report_parts else None
        seconds = world.carry_out(plan)
        for s in schedulers:
            s.observe(plan, state, max(seconds, sum((parts or {}).values())), parts)
        if world.streams and cancels.random() < CANCELLED:
            gone = cancels.choice(world.streams)
            world.cancel(gone.name)
            world.cancel(gone.name)
            world.cancelled.append(gone)
        if world.sweeps and cancels.random() < CANCELLED:
            world.dropped.append(world.sweeps.pop(cancels.randrange(len(world.sweeps))))
    raise AssertionError(f"not finished: {world.streams} {world.sweeps}")


def cut(total: int, size: int) -> list[int]:
    return [size] * (total // size) + [total % size] * (total % size > 0)


def check_schedule(seed: int) -> None:
    world, streams, sweeps = draw_world(seed)
    config = SchedulerConfig(
        itl_seconds=world.itl, ttft_seconds=10.0 * world.itl, drain_after=0.2,
        known_outputs=1 + seed % 3,  # so that it forecasts
    )  # fmt: skip
    ended = run(seed, [Scheduler(config)], config.floor_share)
    assert len(ended.done) + len(ended.cancelled) + len(ended.expired) == len(streams)
    assert len(ended.done_sweeps) + len(ended.dropped) == len(sweeps)
    assert ended.free == ended.blocks, "blocks leaked"
    for sweep in ended.done_sweeps:
        assert sweep.head_cuts == cut(sweep.labels, config.head_rows), "the budget cut a batch of label rows"


@settings(max_examples=2000, **QUIET)
@given(SEEDS)
def test_everything_finishes_and_no_rule_is_broken(seed: int) -> None:
    check_schedule(seed)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chunk", range(10))
def test_everything_finishes_and_no_rule_is_broken_100k(chunk: int) -> None:
    for seed in range(10_000 * chunk, 10_000 * (chunk + 1)):
        check_schedule(seed)


@settings(max_examples=100, **QUIET)
@given(SEEDS)
def test_the_same_calls_give_the_same_plans(seed: int) -> None:
    config = SchedulerConfig(itl_seconds=0.15, drain_after=0.2, known_outputs=1 + seed % 3)
    run(seed, [Scheduler(config), Scheduler(config)], config.floor_share)


@settings(max_examples=150, **QUIET)
@given(SEEDS)
def test_without_a_floor_training_never_goes_over_the_budget(seed: int) -> None:
    """Streams end, and then training has the device: everything finishes with a floor of zero as well."""
    run(seed, [Scheduler(SchedulerConfig(itl_seconds=draw_world(seed)[0].itl, floor_share=0.0, drain_after=0.2))], 0.0)


def fixed_cuts(sweep: Sweep, head_rows: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    layers = range(sweep.layers - 1, -1, -1) if sweep.backward else ()
    backward = [(layer, n) for layer in layers for n in cut(sweep.rows, sweep.window)]
    return cut(sweep.rows, sweep.window), cut(sweep.labels, head_rows), backward


@settings(max_examples=150, **QUIET)
@given(SEEDS)
def test_training_alone_is_cut_the_same_way_at_any_speed(seed: int) -> None:
    r = random.Random(seed)
    world = World(itl=0.2, noise=r.choice((0.0, 5.0)), seed=seed, speed=10.0 ** r.uniform(-4, 1))
    world.sweeps = [
        Sweep(i, r.randint(1, 400), 0, layers=r.randint(1, 4), window=r.choice((16, 50, 64, 256))) for i in range(3)
    ]
    for i, sweep in enumerate(world.sweeps):
        sweep.labels = r.randint(0, sweep.rows)
        sweep.head_steps = r.choice((1, 2, 32))
        sweep.priority = "low" if i == 1 else "normal"
    sweeps = list(world.sweeps)
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.2))
    while world.sweeps:
        state = world.state()
        plan = scheduler.plan(state)
        assert len(plan.rides) <= 1, "two rides share a product: its shape would depend on time"
        scheduler.observe(plan, state, world.carry_out(plan))
    for sweep in sweeps:
        assert (sweep.forward_cuts, sweep.head_cuts, sweep.backward_cuts) == fixed_cuts(sweep, 64)


@settings(max_examples=150, **QUIET)
@given(SEEDS)
def test_training_is_out_of_the_very_next_iteration_when_the_budget_is_gone(seed: int) -> None:
    r = random.Random(seed)
    world = World(itl=0.5, seed=seed, speed=r.choice((0.01, 1.0)))
    world.streams = [Stream("s0", 0.0, 20, 400)]
    world.sweeps = [Sweep(0, 60_000, 900, layers=8)]
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.5, floor_share=0.0))
    trained = 0
    for _ in range(r.randint(2, 25)):
        state = world.state()
        plan = scheduler.plan(state)
        trained += len(plan.rides) + len(plan.units)
        scheduler.observe(plan, state, world.carry_out(plan))
    late = world.state()
    stream = replace(late.requests[0], itl_deadline=late.now + r.choice((-1.0, 0.0, 1e-6)))
    plan = scheduler.plan(replace(late, requests=(stream,)))
    assert plan.decodes == ("s0",) and not plan.rides and not plan.units
    assert scheduler.plan(replace(late, requests=())).rides or scheduler.plan(replace(late, requests=())).units
    assert trained > 0
