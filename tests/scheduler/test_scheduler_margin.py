"""The margin: as wide as recent iterations were unforeseen, no wider for long ones, and at once after a late one."""

from __future__ import annotations

import random

import pytest

from coserve.scheduler.margin import Margins


def settled(stalls: float = 0.03, mean: float = 0.05, rounds: int = 400, kind: str = "training") -> Margins:
    """Iterations that scatter by 4%, a share of which take 30 ms longer."""
    margins, draw = Margins(0.99, 0.9), random.Random(1)
    for _ in range(rounds):
        observe(margins, kind, mean, mean * draw.gauss(1.0, 0.04) + 0.03 * (draw.random() < stalls))
    for _ in range(12):  # no stall for a while: nothing is boosted
        observe(margins, kind, mean, mean)
    return margins


def observe(margins: Margins, kind: str, mean: float, seconds: float) -> None:
    margins.observe(kind, mean, margins.upper(kind, mean, 0.0), seconds)


def test_it_covers_the_quantile_that_it_is_told() -> None:
    margins, draw, over = Margins(0.95, 0.9), random.Random(2), 0
    for i in range(3000):
        seconds = 0.08 * draw.lognormvariate(0.0, 0.1)
        over += i >= 500 and seconds > margins.upper("decode", 0.08, 0.0)
        observe(margins, "decode", 0.08, seconds)
    assert over / 2500 == pytest.approx(0.05, abs=0.015)
    errors = margins.errors
    assert errors.iterations == 1000 and errors.median == pytest.approx(0.067, abs=0.01)
    assert errors.over == pytest.approx(0.05, abs=0.02) and errors.far_over < 0.01


def test_a_stall_costs_short_and_long_iterations_the_same_room() -> None:
    margins = settled()
    assert margins.upper("training", 0.05, 0.0) == pytest.approx(0.082, abs=0.006)
    assert margins.upper("training", 0.15, 0.0) == pytest.approx(0.182, abs=0.006)
    assert margins.upper("training", 0.05, 0.004) == pytest.approx(margins.upper("training", 0.05, 0.0) + 0.004)


def test_prompts_do_not_wait_for_what_is_rare() -> None:
    margins = settled()
    assert margins.upper("prompt", 0.05, 0.0) < 0.057 < margins.upper("decode", 0.05, 0.0)


def test_what_clients_disturb_says_nothing_of_training_alone() -> None:
    margins = settled()
    assert margins.upper("alone", 0.05, 0.0) == 0.05
    for _ in range(50):
        observe(margins, "alone", 0.05, 0.0505)
    assert margins.upper("alone", 0.05, 0.0) < 0.061, "and the first guess is forgotten"
    assert margins.upper("training", 0.05, 0.0) > 0.075


def test_an_iteration_that_was_longer_widens_all_estimates_until_the_next_ones_are_not() -> None:
    margins = settled(stalls=0.0)
    before = margins.upper("decode", 0.05, 0.0)
    observe(margins, "decode", 0.05, 1.3 * before)
    assert margins.upper("prompt", 0.05, 0.0) > 1.25 * 0.05
    observe(margins, "decode", 0.05, 10.0)
    assert 1.5 * 1.3 * 0.05 <= margins.upper("prompt", 0.05, 0.0) < 3.1 * 0.06, "one stall is not a hundredfold one"
    for _ in range(12):
        observe(margins, "decode", 0.05, 0.05)
    assert margins.upper("decode", 0.05, 0.0) < 1.15 * before


def test_a_margin_narrows_when_stalls_have_gone() -> None:
    margins = settled()
    for _ in range(400):
        observe(margins, "decode", 0.05, 0.05)
    assert margins.upper("training", 0.05, 0.0) < 0.0501
