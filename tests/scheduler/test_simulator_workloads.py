"""Drawn workloads have the rates, the burstiness and the popularity that they were asked for, and repeat by seed."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from itertools import pairwise

import pytest

from coserve.scheduler.simulation.streams import Stream
from coserve.scheduler.simulation.workloads import (
    ClosedLoop,
    Lengths,
    Population,
    Together,
    Trace,
    bursts,
    diurnal,
    gamma,
    poisson,
)

LONG = 20_000.0


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def variation(times: list[float]) -> float:
    return statistics.pstdev(gaps(times)) / statistics.mean(gaps(times))


@pytest.mark.parametrize("cv", [1.0, 4.0, 8.0])
def test_gamma_arrivals_have_their_rate_and_their_variation(cv: float) -> None:
    times = gamma(random.Random(3), 2.0, LONG, cv)
    assert times == sorted(times) and times[0] >= 0.0 and times[-1] < LONG
    assert len(times) / LONG == pytest.approx(2.0, rel=0.1 * cv)
    assert variation(times) == pytest.approx(cv, rel=0.15)


def test_no_rate_is_no_arrival() -> None:
    assert poisson(random.Random(0), 0.0, 100.0) == [] == diurnal(random.Random(0), 0.0, 100.0)
    assert bursts(random.Random(0), 0.0, 100.0) == []


def test_bursts_keep_the_mean_rate_and_come_much_faster_inside() -> None:
    times = bursts(random.Random(5), 1.0, LONG, every=100.0, factor=8.0, share=0.1)
    assert times == sorted(times) and times[-1] < LONG
    assert len(times) / LONG == pytest.approx(1.0, rel=0.15)
    a_second = Counter(int(t / 5.0) for t in times)
    counts = sorted(a_second.get(i, 0) for i in range(int(LONG / 5.0)))
    # Outside of bursts 0.59 a second, inside 4.7: of windows of 5 s, the median is calm and the top 5% are not.
    assert counts[len(counts) // 2] <= 4 and counts[int(0.96 * len(counts))] >= 15


def test_a_day_has_a_peak_and_a_night() -> None:
    times = diurnal(random.Random(5), 1.0, LONG, day=1000.0, depth=0.8)
    assert len(times) / LONG == pytest.approx(1.0, rel=0.05)
    hours = Counter(int(t % 1000.0 / 100.0) for t in times)
    assert hours[0] + hours[9] < 0.35 * (hours[4] + hours[5])


def test_few_tenants_and_adapters_get_most_requests() -> None:
    people = Population(tenants=1000, adapters=10, power=1.0, batch_share=0.25, weights=(3.0,))
    streams = Trace([0.01 * i for i in range(20_000)], 1, Lengths(64, 32, 0.5), people, ttft=0.7).begin()
    tenants = Counter(s.tenant for s in streams)
    assert tenants["t0"] / tenants["t1"] == pytest.approx(2.0, rel=0.15)
    assert tenants["t0"] / tenants["t9"] == pytest.approx(10.0, rel=0.25)
    assert len(tenants) > 900
    adapters = Counter(s.adapter for s in streams if s.tenant == "t0")
    assert adapters["t0/a0"] / adapters["t0/a4"] == pytest.approx(5.0, rel=0.3)
    assert all((s.adapter or "").startswith(s.tenant + "/") for s in streams), "an adapter of another tenant"
    assert {s.weight for s in streams if s.tenant == "t0"} == {3.0} and {s.weight for s in streams} == {1.0, 3.0}
    assert sum(s.slo_class == "batch" for s in streams) / len(streams) == pytest.approx(0.25, abs=0.02)
    assert statistics.mean(s.prompt for s in streams) == pytest.approx(64, rel=0.05)
    assert max(s.outputs for s in streams) <= 4 * 32 and {s.ttft for s in streams} == {0.7}


def test_the_same_seed_draws_the_same_and_another_one_does_not() -> None:
    def drawn(seed: int) -> list[Stream]:
        times = gamma(random.Random(seed), 1.0, 200.0, 4.0)
        return Trace(times, seed, Lengths(64, 64, 1.0), Population(5, 2)).begin()

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_replay_keeps_times_and_lengths() -> None:
    people = Population(3, 1)
    first, second = Trace.replay([(4.0, 7, 8), (1.5, 30, 2)], 0, people, ttft=0.4).begin()
    assert [(s.arrived, s.prompt, s.outputs, s.ttft) for s in (first, second)] == [(1.5, 30, 2, 0.4), (4.0, 7, 8, 0.4)]
    assert (first.adapter or "").startswith(first.tenant) and first.name != second.name


def test_clients_of_a_closed_loop_send_again_when_they_have_their_answer() -> None:
    loop = ClosedLoop(3, 0, Lengths(10, 5), pause=0.5, tenant="a", begins=2.0)
    begun = loop.begin()
    assert [(s.arrived, s.prompt, s.outputs, s.tenant) for s in begun] == [(2.0, 10, 5, "a")] * 3
    following = loop.after(begun[0], 7.0)
    assert following is not None and following.arrived == 7.5
    assert len({s.name for s in (*begun, following)}) == 4
    both = Together([loop, ClosedLoop(1, 0, tenant="b"), Trace([1.0], 0)])
    assert [s.arrived for s in both.begin()] == [0.0, 1.0, 2.0, 2.0, 2.0]
    answered = both.after(Stream("b-1", 0.0, 1, 1, tenant="b"), 3.0)
    assert answered is not None and answered.tenant == "b", "the wrong client sent again"
