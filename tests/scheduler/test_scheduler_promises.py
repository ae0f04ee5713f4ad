"""Streams with looser promises share longer iterations, for training and prompts; nobody else's promise pays for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_states import prompt, request, state, stream

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.budget import iteration_budget
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.simulation import Ledger, Setup, cards, report, simulate
from coserve.scheduler.simulation.streams import Stream
from coserve.scheduler.simulation.workloads import (
    ClosedLoop,
    Lengths,
    Sender,
    Together,
    Trace,
    TrainingJob,
)  # fmt: skip
from coserve.scheduler.state import RequestState

CARD = cards()["cpu-270m"]
ITL = 2 * 0.0375  # twice the decode step of four streams
NOW = 100.0
CONFIG = SchedulerConfig(itl_seconds=0.1, ttft_seconds=1.0)


def due(seconds: float, **changes: object) -> RequestState:
    return replace(stream("s0", **changes), itl_deadline=NOW + seconds)


@pytest.mark.parametrize(
    ("deadlines", "expected", "budget"),
    [
        ((), False, 0.1),  # training alone: somebody may arrive, and longer iterations save no decode step
        ((0.1, 0.08), False, 0.08),
        ((0.4, 0.09), False, 0.09),  # one interactive stream
        ((0.4, 0.2), False, 0.2),
        ((0.4, 0.4), False, 0.25),  # a quarter of a first token that may be asked for
        ((0.4, 0.4), True, 0.1),
        ((0.4, -0.3), False, -0.3),
    ],
)
def test_the_budget_follows_the_promises_of_those_who_are_there(
    deadlines: tuple[float, ...], expected: bool, budget: float
) -> None:
    decodes = [due(d) for d in deadlines]
    assert iteration_budget(CONFIG, NOW, decodes, expected) == pytest.approx(budget)
    unknown = replace(CONFIG, ttft_seconds=0.0)
    assert iteration_budget(unknown, NOW, decodes, False) == pytest.approx(min(budget, 0.1))


def test_an_interactive_prompt_ends_long_iterations_and_an_overdue_batch_one_does_not() -> None:
    scheduler = Scheduler(CONFIG)

    def budget(*others: RequestState) -> float:
        return scheduler.plan(state(due(0.4, slo_class="batch"), *others, now=NOW)).budget_seconds

    assert budget() == pytest.approx(0.25)
    assert budget(request("w1", slo_class="batch", ttft_deadline=1.0)) == pytest.approx(0.25)
    assert budget(request("w1", adapter="x", adapter_ready=False)) == pytest.approx(0.1)
    assert budget(prompt("p1", 16, 90, 1)) == pytest.approx(0.1)
    assert budget(due(0.1)) == pytest.approx(0.1)
    assert Lineup(state(due(0.1)), scheduler.share).expects is False, "a stream is no prompt"


class Flex(ClosedLoop):
    """Clients of the batch class, which are promised tokens at four times the interval."""

    def _next(self, at: float) -> Stream:
        made = super()._next(at)
        made.slo_class, made.itl = "batch", 4.0 * ITL
        return made


def run(ttft: float, clients: int, prompts: int, asking: float, jobs: int) -> Ledger:
    """`asking`: seconds between two interactive requests of another tenant; `ttft`: what the scheduler is told."""
    flex = Flex(clients, 5, Lengths(prompts, 64, 0.3), ttft=100 * ITL, tenant="flex")
    times = [2.0 + i * asking for i in range(int(38.0 / asking))] if asking else []
    other = Trace(times, 9, Lengths(64, 64, 0.3), Sender("asks"), ttft=10 * ITL)
    return simulate(
        lambda: Scheduler(SchedulerConfig(itl_seconds=ITL, ttft_seconds=ttft)), Setup(CARD, itl=ITL, ttft=10 * ITL),
        Together([flex, other]), [TrainingJob(f"j{i}", tenant="flex") for i in range(jobs)], seconds=40.0,
    )  # fmt: skip


def kept(ledger: Ledger) -> float:
    """Share of the requests inside both of their own promises."""
    ended = [s for s in ledger.streams if s.finished_at is not None and s.first_at is not None]
    inside = [
        s.first_at - s.arrived <= s.ttft and s.finished_at - s.first_at <= (s.generated - 1) * (s.itl or ITL)
        for s in ended
    ]
    return sum(inside) / len(inside)


def test_looser_promises_give_training_room_and_every_promise_is_kept() -> None:
    """At twice the decode step streams leave a job next to nothing; at four times as much it has most of the time."""
    short, loose = (report(run(ttft, 4, 64, 0.0, 1), 8.0) for ttft in (0.0, 10 * ITL))
    assert loose.training_rate > 4.0 * short.training_rate > 0.0
    mixed = run(10 * ITL, 4, 64, 4.0, 1)
    assert kept(mixed) == 1.0, "nor does who arrives in a long iteration wait too long"
    assert sum(s.tenant == "asks" and s.finished_at is not None for s in mixed.streams) >= 8
    assert report(mixed, 8.0).training_rate > 2.0 * report(run(0.0, 4, 64, 4.0, 1), 8.0).training_rate


def test_looser_promises_make_prompts_quicker() -> None:
    short, loose = (report(run(ttft, 8, 400, 0.0, 0), 8.0) for ttft in (0.0, 10 * ITL))
    assert loose.output_rate > 1.05 * short.output_rate
    assert loose.ttft_p50 < 0.5 * short.ttft_p50
