"""The latency model against costs it does not contain: steps by rows, noise, stalls, a change of speed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from coserve.scheduler.features import (
    SIZE,
    ForwardLoad,
    Vector,
    backward_vector,
    forward_vector,
    head_vector,
    overhead_vector,
    slice_vector,
)
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.plan_features import PlanFeatures, plan_features
from coserve.scheduler.state import HeadUnit, Plan, SchedulerState, SweepState
from coserve.scheduler.traits import Traits


class Device:
    """Seconds by rows as measured for a 270M model on two cores: not linear, with a step near 16 rows."""

    def __init__(self, seed: int, noise: float, stalls: float = 0.0) -> None:
        self.random = np.random.default_rng(seed)
        self.noise, self.stalls = noise, stalls
        self.speed = 1.0

    def measured(self, seconds: float) -> float:
        stall = 5.0 if self.random.random() < self.stalls else 1.0
        return seconds * self.speed * stall * max(0.5, 1.0 + self.noise * self.random.standard_normal())

    @staticmethod
    def forward(rows: int) -> float:
        return float(np.interp(rows, [1, 4, 5, 20, 68, 132, 260, 600], [0.09, 0.19, 0.2, 0.32, 0.33, 0.43, 0.76, 1.8]))

    def draw(self) -> tuple[PlanFeatures, float, dict[int | str, float]]:
        r = self.random
        decodes, prompt = int(r.integers(1, 20)), int(r.choice([0, 0, 0, 16, 100, 300]))
        ride = int(r.choice([0, 0, 8, 64, 128]))
        load = ForwardLoad(decodes, decodes * 200, prompt, prompt * 100, ride, ride * 100, decodes, 2)
        units: list[Vector] = []
        parts: dict[int | str, float] = {"forward": self.measured(self.forward(load.rows))}
        for i in range(int(r.integers(0, 6))):
            kind = r.integers(0, 3)
            if kind == 0:
                rows = int(r.choice([8, 16, 64]))
                share = float(r.choice([1 / 32, 0.25, 1.0]))
                units.append(head_vector(rows, share))
                parts[i] = self.measured(0.003 + share * (0.15 + 0.0042 * rows))
            elif kind == 1:
                tokens = int(r.choice([8, 16, 64, 128, 256]))
                units.append(backward_vector(tokens, 0))
                parts[i] = self.measured(0.007 + 0.0003 * tokens)
            else:
                tokens, layers = int(r.choice([8, 16, 64])), int(r.integers(1, 18))
                units.append(slice_vector(tokens, layers / 18))
                parts[i] = self.measured(layers / 18 * (0.08 + 0.0015 * tokens))
        features = PlanFeatures(forward_vector(load), tuple(units), overhead_vector())
        return features, sum(parts.values()) + 0.002 * self.speed, parts


def decode(rows: int) -> PlanFeatures:
    return PlanFeatures(forward_vector(ForwardLoad(rows, rows * 200, logit_rows=rows)), (), overhead_vector())


def taught(quantile: float = 0.99, rounds: int = 60, seconds: float = 0.2) -> LatencyModel:
    model = LatencyModel(quantile, 0.9, 0.98)
    for _ in range(rounds):
        model.observe(decode(4), seconds)
    return model


@pytest.mark.parametrize("with_parts", [True, False])
@pytest.mark.parametrize("speed", [1.0, 0.001])
def test_it_learns_costs_that_are_not_linear_in_rows(with_parts: bool, speed: float) -> None:
    device = Device(seed=7, noise=0.03, stalls=0.002)
    device.speed = speed
    model = LatencyModel(0.99, 0.9, 0.98)
    errors, over = [], []
    for i in range(900):
        features, seconds, parts = device.draw()
        if i >= 200:
            mean, upper = model.predict(features)
            errors.append(abs(seconds / mean - 1.0))
            over.append(seconds > 1.2 * upper)
        model.observe(features, seconds, parts if with_parts else None)
    assert np.median(errors) < 0.06
    assert np.mean(over) < 0.015, "iterations that the upper estimate missed by more than a fifth"
    errors = model.margins.errors
    assert errors.median < 0.1 and errors.iterations == 899


def test_it_follows_a_machine_that_becomes_slower_within_ten_iterations() -> None:
    device = Device(seed=1, noise=0.02)
    model = LatencyModel(0.99, 0.9, 0.98)
    for _ in range(300):
        features, seconds, parts = device.draw()
        model.observe(features, seconds, parts)
    device.speed = 1.6
    late = []
    for _ in range(40):
        features, seconds, parts = device.draw()
        late.append(seconds > model.predict(features)[1])
        model.observe(features, seconds, parts)
    assert late[0] and sum(late[10:]) <= 2


def test_an_under_prediction_widens_the_margin_at_once_and_it_narrows_again() -> None:
    model = taught()
    before = model.predict(decode(4))[1]
    model.observe(decode(4), 0.4)
    after = model.predict(decode(4))[1]
    assert after > 1.3 * before
    for _ in range(80):
        model.observe(decode(4), 0.2)
    assert model.predict(decode(4))[1] < 1.1 * before


def test_one_stall_hardly_moves_the_mean_and_three_do() -> None:
    model = taught()
    model.observe(decode(4), 2.0)
    assert model.predict(decode(4))[0] < 0.25
    for _ in range(4):
        model.observe(decode(4), 0.3)
    assert model.predict(decode(4))[0] > 0.27


def test_a_shape_that_is_not_seen_for_long_keeps_its_estimate_and_its_certainty() -> None:
    device = Device(seed=3, noise=0.02)
    model = LatencyModel(0.99, 0.9, 0.98)
    for _ in range(300):
        features, seconds, parts = device.draw()
        model.observe(features, seconds, parts)
    mean, deviation = model.part(head_vector(64, 1.0))
    for _ in range(2000):
        seconds = device.measured(0.19)
        model.observe(decode(4), seconds + 0.002, {"forward": seconds})
    later_mean, later_deviation = model.part(head_vector(64, 1.0))
    assert later_mean == pytest.approx(mean, rel=0.02)
    assert later_deviation < max(1.3 * deviation, 0.05 * mean)


def test_costs_never_fall_with_rows_and_no_estimate_is_negative() -> None:
    device = Device(seed=5, noise=0.3, stalls=0.05)
    model = LatencyModel(0.95, 0.9, 0.9)
    for _ in range(400):
        features, seconds, parts = device.draw()
        model.observe(features, seconds, parts if device.random.random() < 0.5 else None)
    for vector in (lambda n: head_vector(n, 0.5), lambda n: backward_vector(n, 0), lambda n: slice_vector(n, 0.3)):
        means = [model.part(vector(n))[0] for n in range(1, 600)]
        assert means[0] >= 0.0
        assert all(b >= a - 1e-12 for a, b in pairwise(means))


def test_a_thousand_strong_updates_leave_the_covariance_positive_definite() -> None:
    device = Device(seed=9, noise=0.0)
    model = LatencyModel(0.95, 0.9, 0.9)
    for _ in range(2500):
        features, seconds, parts = device.draw()
        model.observe(features, seconds, parts)
    for x in np.eye(SIZE):
        mean, deviation = model.part(x)
        assert np.isfinite([mean, deviation]).all() and mean >= 0.0 and deviation >= 0.0
        assert x @ model._covariance @ x >= 0.0


def test_a_lasting_bias_is_corrected_not_taken_for_noise() -> None:
    """A unit fifteen times cheaper than the prior says, timed exactly every time."""
    model = LatencyModel(0.99, 0.9, 0.98)
    for tokens in (512, 512, 256, 512, 512, 512):
        features = PlanFeatures(None, (backward_vector(tokens, 0),) * 20, overhead_vector())
        model.observe(features, 20 * 0.002 + 0.001, dict.fromkeys(range(20), 0.002))
    assert model.part(backward_vector(512, 0))[0] == pytest.approx(0.002, rel=0.1)


def test_head_units_of_some_sub_steps_tell_the_cost_of_others() -> None:
    model = LatencyModel(0.99, 0.9, 0.98)

    def cost(steps: int) -> float:
        return 0.002 + steps / 32 * 0.18

    for steps in (8, 16, 8, 1, 16, 8, 1):
        features = PlanFeatures(None, (head_vector(64, steps / 32),), overhead_vector())
        model.observe(features, cost(steps) + 0.001, {0: cost(steps)})
    for steps in (2, 4, 32):
        assert model.part(head_vector(64, steps / 32))[0] == pytest.approx(cost(steps), rel=0.1)


def test_a_head_unit_is_costed_by_what_is_left_of_its_batch() -> None:
    """Calibration asks for more rows or sub-steps than there are, over several units of one plan."""
    sweep = SweepState(
        sweep_id=0,
        jobs=(),
        layers=4,
        stream_tokens=100,
        window=64,
        forward_tokens=100,
        partial_tokens=0,
        partial_layer=0,
        head_rows_ready=75,
        head_rows_left=75,
        head_steps=32,
        head_partial_rows=64,
        head_partial_steps=8,
        backward=True,
        backward_layer=3,
        backward_tokens=0,
    )
    state = SchedulerState(0.0, (), (sweep,), 0, 16, 1, 1)
    plan = Plan(units=(HeadUnit(0, 64, 16), HeadUnit(0, 64, 32), HeadUnit(0, 64, 4), HeadUnit(0, 64, 32)))
    expected = [(64, 0.5), (64, 0.25), (11, 0.125), (11, 0.875)]
    for x, (rows, share) in zip(plan_features(plan, state, Traits()).units, expected, strict=True):
        assert x.tolist() == head_vector(rows, share).tolist()


@pytest.mark.parametrize("seconds", [-0.1, float("nan"), float("inf")])
def test_impossible_durations_are_refused(seconds: float) -> None:
    model = LatencyModel(0.99, 0.9, 0.98)
    with pytest.raises(ValueError, match="finite"):
        model.observe(decode(1), seconds)
    with pytest.raises(ValueError, match="finite"):
        model.observe(decode(1), 1.0, {"forward": seconds})
    with pytest.raises(ValueError, match="does not have"):
        model.observe(decode(1), 1.0, {3: 0.1})
