"""Prompt chunks fill the budget, and prompts share it."""

from __future__ import annotations

import random

from scheduler_world import Stream, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.search import largest
from coserve.scheduler.simulation import Report, Setup, cards, report, simulate
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths
from coserve.scheduler.state import Plan

CARD = cards()["cpu-270m"]
STEP = 0.0375  # of four decode rows on that card


def test_the_largest_size_is_found_in_a_few_questions() -> None:
    draw, asked = random.Random(4), []
    for _ in range(300):
        most, bend = draw.randint(1, 2000), draw.randint(1, 2000)

        def seconds(n: int, bend: int = bend) -> float:
            asked.append(n)
            return 0.03 + 0.0001 * n + 0.002 * max(0, n - bend)

        budget = draw.uniform(0.0, 1.2 * seconds(most))
        expected = sum(0.03 + 0.0001 * n + 0.002 * max(0, n - bend) <= budget for n in range(1, most + 1))
        assert largest(most, budget, seconds) == expected
    assert len(asked) / 300 < 9.0, "halving alone needs eleven"


def test_a_chunk_fills_the_budget_with_several_prompts() -> None:
    world = World(noise=0.0, itl=0.25, blocks=400)
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.25))

    def step() -> tuple[Plan, float]:
        state = world.state()
        plan = scheduler.plan(state)
        seconds = world.carry_out(plan)
        scheduler.observe(plan, state, seconds)
        return plan, seconds

    for i in range(60):  # the device's costs are learned from a few prompts
        if i % 5 == 0:
            world.streams.append(Stream(f"w{i}", world.now, 40 + 10 * (i % 7), 12))
        step()
    world.streams.append(Stream("late", world.now, 20, 500))
    step()
    world.streams += [Stream(f"s{i}", world.now, 100, 400, ttft=9.0) for i in range(7)]
    chunks = [step() for _ in range(3)]
    for plan, seconds in chunks[1:]:
        assert plan.decodes and seconds <= 0.25
        assert seconds > 0.75 * 0.25, "the budget is not filled"
    assert any(len(plan.prefills) > 1 for plan, _ in chunks)


def test_chunks_of_a_prompt_that_is_alone_are_alike() -> None:
    world = World(noise=0.0, itl=0.25, blocks=400)
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.25))

    def step() -> Plan:
        state = world.state()
        plan = scheduler.plan(state)
        scheduler.observe(plan, state, world.carry_out(plan))
        return plan

    for i in range(60):
        if i % 5 == 0:
            world.streams.append(Stream(f"w{i}", world.now, 40 + 10 * (i % 7), 12))
        step()
    world.streams.append(Stream("running", world.now, 20, 500))
    step()
    for i in range(4):
        length = 300 + 37 * i
        world.streams.append(Stream(f"alone{i}", world.now, length, 1, ttft=9.0))
        chunks = [prefill.tokens for plan in (step() for _ in range(6)) for prefill in plan.prefills]
        assert sum(chunks) == length and 2 <= len(chunks) <= 4
        assert max(chunks) - min(chunks) <= 0.1 * max(chunks), chunks


def served(streams: int, promise: float) -> Report:
    clients = ClosedLoop(streams, 0, Lengths(64, 64, 0.3), ttft=20.0 * promise)
    setup = Setup(CARD, itl=promise, ttft=20.0 * promise)
    return report(simulate(lambda: Scheduler(SchedulerConfig(itl_seconds=promise)), setup, clients, seconds=40.0), 8.0)


def test_a_short_promise_costs_little_throughput() -> None:
    """Sixteen clients: at twice the decode step of four streams prompts go in chunks, and nobody waits long for it."""
    wide, short = served(16, 100.0), served(16, 2.0 * STEP)
    assert short.output_rate > 0.95 * wide.output_rate
    assert short.ttft_p50 is not None and short.ttft_p50 < 0.45 and short.attainment == 1.0
