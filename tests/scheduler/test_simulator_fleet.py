"""Placement follows adapters and bounds every engine's load; a fleet is as large as its load needs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Setup, cards
from coserve.scheduler.simulation.fleet import Demand, Engine, engines_needed, judge, place
from coserve.scheduler.simulation.workloads import Lengths

ITL = 0.22
SETUP = Setup(cards()["cpu-270m"], itl=ITL, ttft=4.4, max_adapters=4, adapter_load=0.5)
DEMAND = Demand(tenants=60, adapters=2, rate=5.0, lengths=Lengths(30, 20))


def policy() -> Scheduler:
    return Scheduler(SchedulerConfig(itl_seconds=ITL))


@pytest.mark.parametrize("engines", [1, 7, 200, 3000])
def test_all_of_the_load_is_placed_and_no_engine_gets_much_more_than_its_part(engines: int) -> None:
    demand = Demand(tenants=500, adapters=2, rate=100.0)
    placed: Counter = Counter()
    fleet = place(demand, engines)
    for engine in fleet:
        placed.update(engine.rates)
    assert len(fleet) == engines and placed == pytest.approx(demand.rates())
    assert sum(placed.values()) == pytest.approx(100.0)
    assert max(engine.rate for engine in fleet) <= 1.25 * 100.0 / engines + 1e-9


def test_an_adapter_stays_where_it_is_when_an_engine_is_added() -> None:
    demand = Demand(tenants=400, adapters=1, rate=10.0, power=0.0)
    before, after = place(demand, 20), place(demand, 21)
    homes = [{key: i for i, engine in enumerate(fleet) for key in engine.rates} for fleet in (before, after)]
    moved = sum(homes[0][key] != homes[1][key] for key in homes[0])
    assert 0 < moved < 0.2 * len(homes[0]), "rendezvous hashing moves about one in 21"
    assert place(demand, 20) == before


def test_a_popular_adapter_gets_several_engines_and_a_rare_one_one() -> None:
    fleet = place(Demand(tenants=100, adapters=1, rate=10.0, power=1.5), 40)
    copies = Counter(key for engine in fleet for key in engine.rates)
    assert copies[0, 0] >= 12 and copies[99, 0] == 1


def test_an_engine_draws_its_own_adapters_by_their_rates() -> None:
    choose = Engine({(0, 1): 3.0, (5, None): 1.0}).chooser(random.Random(0))
    drawn = Counter(choose() for _ in range(4000))
    assert set(drawn) == {("t0", 1.0, "t0/a1", "interactive"), ("t5", 1.0, None, "interactive")}
    assert drawn["t0", 1.0, "t0/a1", "interactive"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_more_load_needs_more_engines_and_affinity_fewer() -> None:
    needed = engines_needed(policy, SETUP, DEMAND, seconds=20.0)
    assert needed.worst_attainment is not None and needed.worst_attainment >= 0.99
    assert judge(policy, SETUP, DEMAND, max(1, needed.engines // 2), seconds=20.0).worst_attainment < 0.99
    assert engines_needed(policy, SETUP, replace(DEMAND, rate=24.0), seconds=6.0, sample=1).engines > needed.engines
    slow_loads = replace(SETUP, adapter_load=1.5)
    gathered, scattered = (
        engines_needed(policy, slow_loads, replace(DEMAND, rate=9.0), affine=affine, seconds=10.0, sample=1)
        for affine in (True, False)
    )
    assert scattered.engines > gathered.engines and scattered.most_adapters == 120 > gathered.most_adapters


def test_jobs_need_engines_too() -> None:
    demand = Demand(tenants=4, adapters=0, rate=0.2, lengths=Lengths(30, 20), jobs=6, training=1100.0)
    needed = engines_needed(policy, SETUP, demand, seconds=40.0)
    assert needed.engines >= 4 and needed.training_rate >= 1100.0 and needed.most_adapters == 0
    with pytest.raises(ValueError, match="train as much"):
        engines_needed(policy, SETUP, replace(demand, jobs=0), seconds=1.0, sample=0)
