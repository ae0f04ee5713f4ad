"""Placement follows adapters and bounds every engine's load; a fleet is as large as its load needs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Setup, cards
from coserve.scheduler.simulation.fleet import Fleet, engines_needed, judge
from coserve.scheduler.simulation.placement import Demand, Engine, place
from coserve.scheduler.simulation.report import Report
from coserve.scheduler.simulation.workloads import Lengths

ITL = 0.22
SETUP = Setup(cards()["cpu-270m"], itl=ITL, ttft=4.4, max_adapters=4, adapter_load=0.5)
NOTHING = Report(10**6, *[None] * 8, *[0.0] * 5, None)
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


def test_a_few_engines_tell_what_thousands_do() -> None:
    """Engines of 0.6 to 3 requests/s that keep and train by formulas; those that are not simulated are judged."""
    demand = Demand(tenants=9000, adapters=1, rate=5000.0, jobs=3000)
    asked: list[int] = []

    def run(engine: Engine, jobs: int, number: int) -> Report:
        asked.append(number)
        strain = engine.strain(4)
        kept = min(1.0, 1.04 - 0.01 * strain)
        return replace(NOTHING, attainment=kept, training_rate=jobs * (80.0 - 10.0 * strain))

    fleet = Fleet(demand, 2000, True, 4, run)
    assert fleet.look(fleet.representatives) and len(asked) <= 10
    assert max(range(2000), key=lambda i: fleet.engines[i].strain(4)) == asked[0], "the first that would fail"
    others = [i for i in range(2000) if i not in fleet.found]
    missed, untrained = fleet.check(others[:20])
    assert missed < 0.005 and untrained < 1.0 and len(asked) <= 30
    told, true = fleet.report((missed, untrained)), [run(e, fleet.jobs(i), i) for i, e in enumerate(fleet.engines)]
    assert told.training_rate == pytest.approx(sum(r.training_rate for r in true), rel=0.01)
    whole = sum(e.rate * r.attainment for e, r in zip(fleet.engines, true, strict=True)) / 5000.0
    assert told.attainment == pytest.approx(whole, abs=0.002) and told.simulated == len(asked) - 2000
    assert not Fleet(demand, 1400, True, 4, run).look(range(1400)), "engines of 4.5 requests/s keep less than 99%"


def test_scattered_requests_strain_more_than_gathered_ones() -> None:
    gathered, scattered = Engine({(0, 0): 3.0}), Engine({(t, 0): 0.3 for t in range(10)})
    assert gathered.strain(4) == 3.0 and scattered.strain(4) == pytest.approx(3.0 + 6 * 0.3)
    assert Engine({(t, None): 0.3 for t in range(10)}).strain(4) == pytest.approx(3.0)


def test_more_load_needs_more_engines_and_affinity_fewer() -> None:
    needed = engines_needed(policy, SETUP, DEMAND, seconds=10.0, sample=0)
    assert needed.holds and needed.attainment is not None and needed.attainment >= 0.99
    assert not judge(policy, SETUP, DEMAND, max(1, needed.engines // 2), seconds=12.0).holds
    assert engines_needed(policy, SETUP, replace(DEMAND, rate=16.0), seconds=6.0, sample=0).engines > needed.engines
    slow_loads = replace(SETUP, adapter_load=1.5)
    gathered, scattered = (
        engines_needed(policy, slow_loads, replace(DEMAND, rate=9.0), affine=affine, seconds=8.0, sample=0)
        for affine in (True, False)
    )
    assert scattered.engines > gathered.engines and scattered.most_adapters == 120 > gathered.most_adapters


def test_jobs_need_engines_too() -> None:
    demand = Demand(tenants=4, adapters=0, rate=0.2, lengths=Lengths(30, 20), jobs=6, training=1100.0)
    needed = engines_needed(policy, SETUP, demand, seconds=25.0, sample=1)
    assert needed.engines >= 4 and needed.training_rate >= 1100.0 and needed.most_adapters == 0
    with pytest.raises(ValueError, match="train as much"):
        engines_needed(policy, SETUP, replace(demand, jobs=0), seconds=1.0, sample=0, most=8)
