"""Random worlds with too little memory for requests, their adapters and training together: nobody takes more than there
is, training gives way before anybody is preempted, nothing begins in what an adapter waits for, and everything ends.

`scheduler_world.World` carries every plan out and checks blocks, the part of training, that nothing parked runs and
that who runs has its adapter, by its own rules. `nightly` runs 100,000 schedules.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_world import Stream, Sweep, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepJob

SEEDS = st.integers(0, 2**32 - 1)
QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@dataclass
class Case:
    """A world and what is still to come, all from one seed."""

    seed: int
    streams: list[Stream] = field(default_factory=list)
    sweeps: list[tuple[float, Sweep]] = field(default_factory=list)

    def __post_init__(self) -> None:
        r = self.random = random.Random(self.seed)
        self.world = World(
            blocks=r.choice((8, 16, 30)), block_size=r.choice((4, 8)), max_running=r.choice((2, 4, 8)),
            itl=r.choice((0.05, 0.5)), noise=r.choice((0.0, 0.3)), seed=self.seed, speed=r.choice((0.3, 3.0)),
        )  # fmt: skip
        world = self.world
        world.card = replace(world.card, copy=r.choice((0.0, 0.002)))
        world.activation_blocks = r.randint(world.blocks // 2, world.blocks)
        self.missing = r.choice((0, 0, world.blocks // 4))  # blocks that something else takes now and then
        self.config = SchedulerConfig(itl_seconds=world.itl, memory_claim_after=r.choice((0.0, 1.0, 5.0, 5.0, 5.0)))
        tenants = [(f"t{i}", r.choice((1.0, 3.0))) for i in range(r.randint(1, 3))]
        if r.random() < 0.5:
            world.resident.places = world.max_adapters = r.choice((1, 2, 3))
            world.resident.sizes = {a: r.randint(0, world.blocks // 2) for a in "abc"}
        sizes = world.resident.sizes
        at = r.choice((0.1, 0.3)) * world.speed
        for i in range(r.randint(2 * bool(sizes), 6)):
            at += r.choice((0.0, 0.0, 0.1, 1.0)) * world.speed
            adapter = r.choice(("a", "b", "c", None)) if sizes else None
            most = world.block_size * (world.blocks - self.missing - sizes.get(adapter or "", 0))
            outputs = r.randint(1, min(10, most - 1))
            prompt = r.randint(1, min(r.choice((30, 150)), most - outputs))
            tenant, weight = r.choice(tenants)
            self.streams.append(
                Stream(f"s{i}", at, prompt, outputs, tenant=tenant, weight=weight, ttft=r.choice((0.0, 0.0, 2.0)),
                       slo_class=r.choice(("interactive", "batch")), adapter=adapter)
            )  # fmt: skip
        for i in range(r.randint(1, 4)):
            tenant, weight = r.choice(tenants)
            priority, rows = r.choice(("normal", "low")), r.randint(1, 60)
            most_blocks = min(world.activation_blocks, world.blocks - self.missing)
            least = most_blocks // 4 * (r.random() < 0.9)
            blocks = r.randint(least, max(least, most_blocks // r.choice((1, 1, 2))))
            lean_blocks = blocks - r.choice((0, r.randint(0, blocks)))
            came = r.choice((0.0, 0.0, 0.0, 1.0)) * world.speed
            sweep = Sweep(
                i, rows, r.randint(0, rows), layers=r.randint(1, 4), window=r.choice((16, 32)), priority=priority,
                jobs=(SweepJob(f"j{i}", tenant, weight, priority),), blocks=blocks,
                lean_blocks=lean_blocks, placed=False, unplaced_since=came,
            )  # fmt: skip
            self.sweeps.append((came, sweep))

    def arrive(self) -> bool:
        """Who is due comes. Whether there is anything left to do."""
        world = self.world
        while self.streams and self.streams[0].arrived <= world.now:
            world.streams.append(self.streams.pop(0))
        world.sweeps += [s for at, s in self.sweeps if at <= world.now]
        self.sweeps = [(at, s) for at, s in self.sweeps if at > world.now]
        if self.missing and self.random.random() < 0.1:
            held = world.blocks - world.reserved - world.free
            world.reserved = min(self.random.choice((0, self.missing)), world.blocks - held)
            world.resident.evict((), world.used, world.free)  # whoever takes blocks has those of idle adapters
        return bool(self.streams or self.sweeps or world.streams or world.sweeps)


def lacking(state: SchedulerState, requests: Iterable[RequestState]) -> int:
    """Blocks for all of their tokens."""
    return sum(max(0, -(-r.total_tokens // state.block_size) - r.blocks_held) for r in requests)


def check_beginning(state: SchedulerState, plan: Plan, bare: Plan) -> None:
    """What begins leaves the blocks that an adapter waits for; who runs is served as if none did (`bare`)."""
    assert (plan.decodes, plan.preempt) == (bare.decodes, bare.preempt), "the adapter takes something from a stream"
    running = [r for r in state.requests if r.running]
    placed = sum(s.blocks for s in state.sweeps if s.placed)
    if not running and state.adapter_blocks > state.free_blocks + placed:
        return  # it waits for nobody who would end
    named = {p.request_id for p in plan.prefills}
    begins = [r for r in state.requests if r.request_id in named and not r.running]
    if not (begins or any(s.blocks for s in state.sweeps if s.sweep_id in plan.place)):
        return
    used = {r.adapter for r in running}
    woken = {r.adapter: r.blocks_adapter for r in begins if r.adapter not in used}
    left = state.free_blocks - lacking(state, [*running, *begins]) - sum(woken.values())
    for s in state.sweeps:
        left += s.blocks * ((s.sweep_id in plan.park) - (s.sweep_id in plan.place))
        left += (s.blocks - s.lean_blocks) * (s.sweep_id in plan.lean)
    assert left >= state.adapter_blocks, "something begins in blocks that an adapter waits for"


def check_giving(state: SchedulerState, plan: Plan, protected: int | None) -> None:
    """Nobody is preempted while unprotected sweeps hold what is lacking, and none gives what nobody needs."""
    ready = [s for s in state.sweeps if s.placed and s.sweep_id != protected]
    decodes = [r for r in state.requests if r.decoding]
    if plan.preempt and decodes:
        most = state.free_blocks + sum(s.blocks for s in ready)
        assert most < lacking(state, decodes), "preempted before training gave way"
    elif plan.preempt:
        assert all(s.sweep_id in plan.park or not s.blocks for s in ready), "preempted before training gave way"
    gone = {*plan.park, *plan.lean}
    assert gone <= {s.sweep_id for s in ready}, "a protected sweep gave way"
    assert not ((gone or plan.preempt) and plan.place), "blocks are given and taken at once"
    if gone:
        adapters = state.adapter_blocks + sum({r.adapter: r.blocks_adapter for r in state.requests}.values())
        needed = lacking(state, state.requests) + len(state.requests) + adapters
        assert needed > state.free_blocks, "training gave way for nobody"


def run(case: Case, scheduler: Scheduler, other: Scheduler | None = None) -> World:
    """Drive a world to its end. `other` is asked as well and must agree, after drafts that come to nothing and whether
    or not it drafted the plan itself."""
    world, idle, waited = case.world, 0, 0
    wanted: tuple[str, ...] = ()
    for turn in range(6000):
        if not case.arrive():
            return world
        world.load_adapter(wanted)
        state = world.state()
        bare = scheduler.draft(replace(state, adapter_blocks=0)).plan if state.adapter_blocks else Plan()
        plan = scheduler.plan(state)
        wanted = plan.adapters
        waited = waited + 1 if state.adapter_blocks else 0
        assert waited < 300, "an adapter waits for ever"
        if waited:
            check_beginning(state, plan, bare)
        if other is not None:
            draft = other.draft(state)
            assert draft.plan == plan, "a draft is not the plan"
            other.draft(replace(state, free_blocks=0, now=state.now + 1.0))
            assert other.plan(state, draft if turn % 2 else None) == plan, "the same calls gave different plans"
        check_giving(state, plan, scheduler.memory.protected)
        if plan.empty:
            assert not any(s.placed and s.sweep_id not in plan.park for s in state.sweeps), "a sweep could run"
            world.now += world.move(plan) + 0.2
            idle += 1
            assert idle < 400, "nothing runs any more"
            continue
        idle = 0
        seconds = world.carry_out(plan)
        for s in (scheduler, other):
            if s is not None:
                (s.account if turn % 4 else s.observe)(plan, state, seconds)  # what is learned matters little here
    raise AssertionError(f"not finished: {world.streams} {world.sweeps}")


def check_schedule(seed: int) -> None:
    case = Case(seed)
    streams, sweeps = len(case.streams), len(case.sweeps)
    ended = run(case, Scheduler(case.config))
    assert len(ended.done) == streams and len(ended.done_sweeps) == sweeps
    assert ended.free == ended.blocks - ended.reserved, "blocks leaked"
    assert ended.resident.blocks(set(ended.resident)) <= ended.free, "adapters that are there do not fit"


@settings(max_examples=2000, **QUIET)
@given(SEEDS)
def test_memory_is_never_overdrawn_and_everything_ends(seed: int) -> None:
    check_schedule(seed)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=100_000, **QUIET)
@given(SEEDS)
def test_memory_is_never_overdrawn_and_everything_ends_100k(seed: int) -> None:
    check_schedule(seed)


@settings(max_examples=50, **QUIET)
@given(SEEDS)
def test_drafts_leave_no_trace_in_memory_and_are_the_plan(seed: int) -> None:
    case = Case(seed)
    run(case, Scheduler(case.config), Scheduler(case.config))
