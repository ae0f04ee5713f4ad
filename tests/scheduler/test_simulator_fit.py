"""A card fitted to recorded iterations costs what the machine that made them did."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Setup, cards, simulate
from coserve.scheduler.simulation.cards import Card, Curve
from coserve.scheduler.simulation.fit import fit
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths, TrainingJob

CARD = cards()["cpu-270m"]


def times(curve: Curve, factor: float) -> Curve:
    return Curve(tuple((rows, factor * seconds) for rows, seconds in curve.points), curve.tile)


def records(card: Card, *jobs: TrainingJob, seconds: float = 90.0) -> list[dict]:
    setup = Setup(card, itl=0.3, ttft=6.0)
    ledger = simulate(
        lambda: Scheduler(SchedulerConfig(itl_seconds=0.3)),
        setup,
        ClosedLoop(3, 0, Lengths(40, 40)),
        jobs,
        seconds=seconds,
    )
    return [i.record() for i in ledger.iterations]


def test_the_factors_of_another_machine_are_found() -> None:
    other = replace(
        CARD,
        forward=times(CARD.forward, 0.5), logits=times(CARD.logits, 0.5), slice=0.5 * CARD.slice, ride=0.5 * CARD.ride,
        head=times(CARD.head, 2.0), backward=times(CARD.backward, 1.5),
    )  # fmt: skip
    found = fit(CARD, records(other, TrainingJob("job")))
    assert found.factors == pytest.approx((0.5, 2.0, 1.5), rel=0.15)
    assert found.error < 0.05
    assert found.card.head(64) == pytest.approx(other.head(64), rel=0.15)
    assert found.card.logits(4) == pytest.approx(other.logits(4), rel=0.15)
    assert found.card.backward(256) == pytest.approx(other.backward(256), rel=0.15)
    assert found.card.forward(4) == pytest.approx(other.forward(4), rel=0.15)


def test_the_same_machine_is_itself_and_what_never_ran_stays() -> None:
    assert fit(CARD, records(CARD, TrainingJob("job"))).factors == pytest.approx((1.0, 1.0, 1.0), rel=0.12)
    passes, head, backward = fit(CARD, records(CARD)).factors
    assert passes == pytest.approx(1.0, rel=0.1) and (head, backward) == (1.0, 1.0)


def test_stalls_do_not_count() -> None:
    stalled = records(CARD, TrainingJob("job"))
    for i in range(0, len(stalled), 60):
        stalled[i]["measured_s"] += 3.0
    assert fit(CARD, stalled).factors == pytest.approx(fit(CARD, records(CARD, TrainingJob("job"))).factors, rel=0.1)


def test_a_handful_of_iterations_is_refused() -> None:
    with pytest.raises(ValueError, match="31 iterations are too few"):
        fit(CARD, records(CARD)[:31])
