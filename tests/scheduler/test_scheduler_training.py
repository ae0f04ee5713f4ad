"""What training gets: all that the budget leaves, in the sweep's order, and a floor."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_states import sweep
from scheduler_world import Stream, Sweep, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Plan, Ride, Unit


def warmed(world: World, config: SchedulerConfig, rounds: int = 150) -> Scheduler:
    """A scheduler that has seen streams, prompts and training in this world, which is empty again afterwards."""
    scheduler = Scheduler(config)
    for i in range(rounds):
        if not world.sweeps:
            world.sweeps = [Sweep(1000 + i, 256, 100)]
        if i % 6 == 0 and len(world.streams) < 4:
            world.streams.append(Stream(f"warm{i}", world.now, 40, 20))
        step(scheduler, world)
    world.streams, world.sweeps = [], []
    return scheduler


def step(scheduler: Scheduler, world: World) -> tuple[Plan, float]:
    state = world.state()
    plan = scheduler.plan(state)
    parts = world.parts(plan)
    seconds = world.carry_out(plan)
    scheduler.observe(plan, state, max(seconds, sum(parts.values())), parts)
    return plan, seconds


def test_alone_one_sweep_runs_as_fixed_units_in_its_order() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e9))
    world = World()

    def units(**changes: object) -> tuple[tuple[Ride, ...], tuple[Unit, ...]]:
        plan = scheduler.plan(replace(world.state(), sweeps=(sweep(**changes),)))
        return plan.rides, plan.units

    assert units() == ((Ride(0, 64),), ()), "one ride an iteration, and no head before 64 rows are ready"
    assert units(forward_tokens=128, head_rows_ready=78) == ((Ride(0, 64),), (HeadUnit(0, 64, 32),))
    rides, rest = units(forward_tokens=192, head_rows_ready=10, head_rows_left=74)
    assert rides == (Ride(0, 8),)
    assert rest[:2] == (HeadUnit(0, 64, 32), HeadUnit(0, 10, 32))
    assert rest[2:6] == (BackwardUnit(0, 64),) * 3 + (BackwardUnit(0, 8),)
    assert len(rest) == 2 + 4 * 4
    assert units(partial_tokens=20, partial_layer=1) == ((), (ForwardUnit(0, 20, 3),)), (
        "an unfinished window ends first"
    )
    unfinished = {"head_rows_ready": 100, "head_partial_rows": 30, "head_partial_steps": 27}
    assert units(forward_tokens=128, partial_tokens=20, partial_layer=1, **unfinished) == (
        (),
        (HeadUnit(0, 30, 5), ForwardUnit(0, 20, 3), HeadUnit(0, 64, 32)),
    ), "and so does an unfinished batch of label rows"
    rest = units(forward_tokens=200, head_rows_left=100, **unfinished)[1]
    assert rest[:4] == (HeadUnit(0, 30, 5), HeadUnit(0, 64, 32), HeadUnit(0, 6, 32), BackwardUnit(0, 64))
    done = {"forward_tokens": 200, "head_rows_left": 0}
    assert units(**done, backward=False, backward_layer=-1) == ((), ()), "an evaluation ends with its head"
    assert units(**done, backward_layer=0, backward_tokens=190)[1] == (BackwardUnit(0, 10),)


def test_alone_time_decides_how_many_units_run_and_one_always_does() -> None:
    world = World(noise=0.0)
    ready = sweep(forward_tokens=200, head_rows_left=0)
    counts = []
    for itl in (0.001, 0.1, 0.2):
        scheduler = warmed(World(noise=0.0, itl=0.2), SchedulerConfig(itl_seconds=itl))
        plan = scheduler.plan(replace(world.state(), sweeps=(ready,)))
        counts.append(len(plan.units))
        if itl > 0.001:
            assert 0.7 * itl < world.seconds(plan) <= itl
    assert counts[0] == 1 and 1 < counts[1] < counts[2]


def test_beside_streams_training_fills_the_budget_and_does_not_break_it() -> None:
    world = World(noise=0.05, itl=0.25, blocks=400)
    scheduler = warmed(world, SchedulerConfig(itl_seconds=0.25))
    world.streams = [Stream(f"s{i}", world.now, 30, 300) for i in range(4)]
    while not all(s.generated for s in world.streams):
        step(scheduler, world)
    used, trained = [], 0
    for i in range(120):
        if not world.sweeps:
            world.sweeps = [Sweep(i, 200, 150)]
        plan, seconds = step(scheduler, world)
        assert len(plan.decodes) == 4
        trained += bool(plan.rides or plan.units)
        used.append(seconds)
    assert trained >= 118
    assert sum(s > 0.25 for s in used) <= 2
    assert sum(used) / len(used) > 0.75 * 0.25


def test_a_budget_too_small_for_the_whole_depth_takes_some_layers_of_a_window() -> None:
    world = World(noise=0.0, itl=0.25, blocks=400)
    scheduler = warmed(world, SchedulerConfig(itl_seconds=0.25, floor_share=0.0))
    state = replace(World(noise=0.0).state(), now=world.now, sweeps=(sweep(layers=40, window=256, stream_tokens=256),))
    world.streams = [Stream("s0", world.now, 20, 100)]
    step(scheduler, world)
    decoding = world.state().requests[0]
    decode = scheduler.plan(replace(state, requests=(replace(decoding, itl_deadline=world.now + 10.0),), sweeps=()))
    tight = replace(decoding, itl_deadline=world.now + decode.upper_seconds + 0.02)
    plan = scheduler.plan(replace(state, now=world.now, requests=(tight,)))
    assert plan.decodes and not plan.rides
    (unit,) = {type(u): u for u in plan.units}.values()
    assert isinstance(unit, ForwardUnit) and 1 <= unit.layers < 40
    assert plan.upper_seconds <= plan.budget_seconds


def test_a_budget_too_small_for_a_batch_of_label_rows_takes_some_sub_steps_of_it() -> None:
    """65 ms beside the decode's 40: no iteration has room for a whole batch (72 ms) or for a small one in one go."""
    config = SchedulerConfig(itl_seconds=0.065, floor_share=0.0)
    scheduler = warmed(World(noise=0.0), config)
    world = World(noise=0.0, itl=0.065, blocks=400)
    world.streams = [Stream("s0", world.now, 20, 400)]
    while not world.streams[0].generated:
        step(scheduler, world)
    world.sweeps = [Sweep(0, 150, 150, head_steps=32, layers=4, forwarded=150)]
    (running,) = world.sweeps
    for _ in range(40):
        if running.headed == running.labels:
            break
        batch = running.batch or min(64, running.labels - running.headed)
        plan, seconds = step(scheduler, world)
        assert plan.decodes and seconds <= 0.065
        assert isinstance(plan.units[0], HeadUnit) and plan.units[0].rows == batch
    assert running.head_cuts == [64, 64, 22], "a batch is never cut"
    assert 6 <= running.head_stops <= 30, "every iteration took as many sub-steps as fit"


def test_the_floor_takes_an_unfinished_batch_to_its_end() -> None:
    world = World(noise=0.0, itl=0.02, blocks=400)  # decode alone takes longer than the promise
    scheduler = warmed(World(noise=0.0), SchedulerConfig(itl_seconds=0.02, floor_share=0.1))
    world.streams = [Stream("s0", 0.0, 20, 400)]
    world.sweeps = [Sweep(0, 150, 150, head_steps=32, forwarded=150, batch=64, batch_steps=12)]
    (running,) = world.sweeps
    units: list[Unit] = []
    while not running.headed:
        units += step(scheduler, world)[0].units
    assert units == [HeadUnit(0, 64, 20)]


def test_what_an_older_sweep_cannot_use_a_newer_one_gets() -> None:
    """The older one is at its head, of which not one sub-step fits; the newer one has small backward units."""
    world = World(noise=0.0, itl=0.25, blocks=400)
    scheduler = warmed(world, SchedulerConfig(itl_seconds=0.25, floor_share=0.0))
    world.streams = [Stream("s0", world.now, 20, 100)]
    step(scheduler, world)
    state = world.state()
    decode = scheduler.plan(state)
    head = sweep(0, forward_tokens=200, head_rows_ready=150, head_steps=2)
    backward = sweep(1, forward_tokens=200, head_rows_left=0)
    tight = replace(state.requests[0], itl_deadline=state.now + decode.upper_seconds + 0.015)
    plan = scheduler.plan(replace(state, requests=(tight,), sweeps=(head, backward)))
    assert plan.units and all(isinstance(u, BackwardUnit) and u.sweep_id == 1 for u in plan.units)
    wide = replace(state.requests[0], itl_deadline=state.now + 10.0)
    plan = Scheduler(SchedulerConfig(itl_seconds=10.0)).plan(replace(state, requests=(wide,), sweeps=(head, backward)))
    assert isinstance(plan.units[0], HeadUnit), "with room for both the older one goes first"


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_training_keeps_its_floor_when_the_budget_has_no_room(share: float) -> None:
    world = World(noise=0.0, itl=0.02, blocks=400)  # decode alone takes longer than the promise
    scheduler = warmed(World(noise=0.0), SchedulerConfig(itl_seconds=0.02, floor_share=share))
    world.streams = [Stream(f"s{i}", 0.0, 20, 4000) for i in range(2)]
    world.sweeps = [Sweep(0, 100_000, 0, backward=False)]
    trained = 0.0
    while world.now < 100.0:
        plan, seconds = step(scheduler, world)
        without = world.seconds(replace(plan, rides=(), units=()))
        trained += seconds - without
    assert share * 0.7 < trained / world.now < share * 1.3


def test_no_floor_means_no_training_without_room() -> None:
    world = World(noise=0.0, itl=0.02, blocks=400)
    scheduler = warmed(World(noise=0.0), SchedulerConfig(itl_seconds=0.02, floor_share=0.0))
    world.streams, world.sweeps = [Stream("s0", 0.0, 20, 300)], [Sweep(0, 1000, 0)]
    step(scheduler, world)
    for _ in range(200):
        plan, _ = step(scheduler, world)
        assert plan.decodes and not plan.rides and not plan.units


def test_low_priority_waits_for_normal_but_gets_its_floor() -> None:
    world = World(noise=0.0, itl=0.25)
    scheduler = warmed(World(noise=0.0), SchedulerConfig(itl_seconds=0.25, floor_share=0.05))
    world.sweeps = [Sweep(0, 50_000, 0, priority="low"), Sweep(1, 50_000, 0)]
    low = 0.0
    while world.now < 60.0:
        plan, seconds = step(scheduler, world)
        mine = sum(u.sweep_id == 0 for u in (*plan.rides, *plan.units))
        low += seconds * mine / (len(plan.rides) + len(plan.units))
    assert 0.03 < low / world.now < 0.08


def test_training_gives_way_to_a_first_token_that_would_be_late() -> None:
    world = World(noise=0.0, itl=0.5)
    scheduler = warmed(World(noise=0.0), SchedulerConfig(itl_seconds=0.5, floor_share=0.0))
    state = replace(world.state(), now=50.0, sweeps=(sweep(forward_tokens=200, head_rows_left=0),))
    waiting = Stream("s0", 50.0, 100, 5)
    world.streams, world.now = [waiting], 50.0
    relaxed = scheduler.plan(replace(state, requests=world.state().requests))
    waiting.ttft = 0.15
    urgent = scheduler.plan(replace(state, requests=world.state().requests))
    waiting.ttft = -1.0
    overdue = scheduler.plan(replace(state, requests=world.state().requests))
    assert all(p.prefills for p in (relaxed, urgent, overdue))
    assert relaxed.upper_seconds <= 0.5 and len(relaxed.units) > len(urgent.units) > 0
    assert urgent.upper_seconds <= 0.15
    assert not overdue.units


def test_a_plan_for_calibration_that_the_scheduler_did_not_make_is_learned_too() -> None:
    scheduler = Scheduler(SchedulerConfig())
    world = World()
    state = replace(world.state(), sweeps=(sweep(forward_tokens=200, head_rows_ready=150),))
    plan = Plan(units=(HeadUnit(0, 64, 8), BackwardUnit(0, 16)))
    for _ in range(5):
        scheduler.observe(plan, state, 0.3, {0: 0.25, 1: 0.04})
    assert scheduler.model.observations == 5
    with pytest.raises(KeyError):
        scheduler.observe(Plan(units=(HeadUnit(9, 64, 8),)), state, 0.3)
