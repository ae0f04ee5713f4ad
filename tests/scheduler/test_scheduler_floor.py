"""The floor has its place inside the promise wherever decodes leave one, and costs few late iterations elsewhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from scheduler_states import sweep

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.floor import Floor
from coserve.scheduler.simulation import Ledger, Setup, cards, simulate
from coserve.scheduler.simulation.ledger import Iteration
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths, TrainingJob
from coserve.scheduler.state import SweepJob

CARD = cards()["cpu-270m"]
STEP = 0.0375
WARM = 10.0  # seconds
SECONDS = 50.0
SHARE = 0.02


def run(steps: float, clients: int, lengths: Lengths, share: float = SHARE, priority: str = "normal") -> Ledger:
    setup = Setup(CARD, itl=steps * STEP, ttft=1e3)
    config = SchedulerConfig(itl_seconds=steps * STEP, floor_share=share)
    jobs = [TrainingJob("j", priority=priority)]
    return simulate(lambda: Scheduler(config), setup, ClosedLoop(clients, 3, lengths, ttft=1e3), jobs, seconds=SECONDS)


def beside(ledger: Ledger) -> tuple[list[Iteration], list[Iteration]]:
    """Iterations that carried streams: those that trained, and the others."""
    after = [i for i in ledger.iterations if i.began > WARM and i.decodes]
    return [i for i in after if i.units or i.rides], [i for i in after if not (i.units or i.rides)]


def trained(ledger: Ledger) -> float:
    """Share of the time."""
    both = [i for part in beside(ledger) for i in part]
    return sum(i.training for i in both) / sum(i.seconds for i in both)


def late(iterations: list[Iteration]) -> float:
    return sum(i.seconds > i.budget for i in iterations) / len(iterations)


@pytest.mark.parametrize(("steps", "priority"), [(2.0, "normal"), (4.0, "normal"), (4.0, "low")])
def test_prompts_without_end_leave_the_floor_its_place_inside_the_promise(steps: float, priority: str) -> None:
    ledger = run(steps, 12, Lengths(400, 24, 0.3), priority=priority)
    training, others = beside(ledger)
    assert 0.93 * SHARE < trained(ledger) < 1.3 * SHARE
    assert late(training) < late(others) + 0.08  # of some thirty iterations
    assert all(i.upper <= i.budget + 1e-9 for i in training)
    without = run(steps, 12, Lengths(400, 24, 0.3), share=0.0)
    prompts = [sum(i.prefill for part in beside(one) for i in part) for one in (ledger, without)]
    assert prompts[0] > 0.92 * prompts[1], "that is what it costs"


def test_decodes_that_fill_the_promise_are_late_for_whole_units_only_and_seldom() -> None:
    ledger = run(1.3, 16, Lengths(8, 2000))
    training, others = beside(ledger)
    assert late(others) > 0.99, "not one row has a place"
    assert 0.9 * SHARE < trained(ledger) < 1.2 * SHARE
    assert len(training) < 0.03 * len(others)
    assert all(i.rides in (0, 256) for i in training)
    gaps = [b.began - a.began for a, b in pairwise(training)]
    assert min(gaps) > 0.8, "spaced by the share"


def test_a_debt_grows_with_time_and_what_was_trained_pays_it() -> None:
    floor = Floor(0.1, 2.0)
    low, first, second = sweep(0, jobs=(SweepJob("j", "t", 1.0, "low"),)), sweep(1), sweep(2)
    sweeps = (low, first, second)
    assert floor.debts(sweeps) == []
    floor.settle(sweeps, 10.0, {2: 9.0})
    assert floor.debts(sweeps) == [(first, pytest.approx(1.0)), (low, pytest.approx(1.0))], "to the oldest of each"
    floor.settle(sweeps, 1.0, {1: 0.6})
    assert floor.debts(sweeps) == [(first, pytest.approx(0.5)), (low, pytest.approx(1.1))]
    floor.settle(sweeps, 100.0, {0: 100.0})
    assert floor.debts(sweeps) == [(first, pytest.approx(10.5))]
    floor.settle(sweeps, 100.0, {1: 100.0, 0: 5.0})
    for _ in range(3):
        floor.settle((low, first), 10.0, {})
    assert floor.debts(sweeps)[0] == (first, pytest.approx(1.0)), "an hour alone counts for one iteration at most"
    floor.settle((low,), 1.0, {})
    assert [s for s, _ in floor.debts(sweeps)] == [low], "a debt to nobody is forgotten"
