"""How many engines a load needs, when an adapter's requests go where the adapter already is.

Placement: an adapter goes to the engine that scores highest for it (rendezvous hashing: another engine moves only what
it takes over), unless that engine would carry more than `slack` times the mean load; then to the next one. An adapter
too popular for one engine is spread over as many as its share needs. Of hundreds of engines the busiest and a sample
of the others are simulated; the fleet is large enough when all of them keep 99% of their requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from coserve.scheduler.simulation.ledger import Setup
from coserve.scheduler.simulation.policies import Policy
from coserve.scheduler.simulation.report import ATTAINMENT, Report, report
from coserve.scheduler.simulation.run import simulate
from coserve.scheduler.simulation.workloads import Lengths, Trace, TrainingJob, gamma

_WARM_UP = 5.0
_MOST = 1 << 16  # engines: more than that is a mistake in the question


@dataclass(frozen=True, slots=True)
class Demand:
    """What all tenants together want. Popularity of tenants, and of a tenant's adapters: rank ** -power."""

    tenants: int
    adapters: int  # of each; 0: all ask the base model
    rate: float  # requests a second, all together
    power: float = 1.0
    cv: float = 1.0  # of an engine's gaps between requests
    lengths: Lengths = field(default_factory=Lengths)
    jobs: int = 0  # running at any time
    training: float = 0.0  # tokens a second that they are to have, all together

    def rates(self) -> dict[tuple[int, int | None], float]:
        """(tenant, adapter) -> requests a second."""
        of_tenant = _shares(self.tenants, self.power)
        if not self.adapters:
            return {(t, None): self.rate * share for t, share in enumerate(of_tenant)}
        of_adapter = _shares(self.adapters, self.power)
        return {
            (t, a): self.rate * share * of_adapter[a] for t, share in enumerate(of_tenant) for a in range(self.adapters)
        }


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine's part: rates by (tenant, adapter)."""

    rates: dict[tuple[int, int | None], float]

    @property
    def rate(self) -> float:
        return sum(self.rates.values())

    def chooser(self, rng: random.Random) -> Callable[[], tuple[str, float, str | None, str]]:
        """Draws (tenant, weight, adapter, class), as `Population` does."""
        keys, weights = list(self.rates), list(self.rates.values())

        def choose() -> tuple[str, float, str | None, str]:
            ((tenant, adapter),) = rng.choices(keys, weights)
            return f"t{tenant}", 1.0, None if adapter is None else f"t{tenant}/a{adapter}", "interactive"

        return choose


@dataclass(frozen=True, slots=True)
class FleetReport:
    engines: int
    busiest_rate: float  # requests a second
    mean_rate: float
    most_adapters: int  # of one engine
    worst_attainment: float | None  # of the engines that were simulated
    training_rate: float  # tokens a second of all jobs, from the sample


def place(demand: Demand, engines: int, slack: float = 1.25, affine: bool = True) -> list[Engine]:
    """Who goes where. Without affinity every request goes to any engine."""
    rates = demand.rates()
    if not affine:
        return [Engine({key: rate / engines for key, rate in rates.items()}) for _ in range(engines)]
    parts: list[dict[tuple[int, int | None], float]] = [{} for _ in range(engines)]
    limit = slack * demand.rate / engines
    loads = np.zeros(engines)
    for number, (key, rate) in enumerate(
        sorted(rates.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or 0))
    ):
        copies = min(engines, ceil(rate / limit))
        order = np.argsort(_scores(number, engines), kind="stable")
        fitting = order[loads[order] + rate / copies <= limit * (1.0 + 1e-9)]
        if len(fitting) < copies:  # nowhere under the limit: where there is most room
            fitting = np.argsort(loads, kind="stable")
        for engine in fitting[:copies]:
            parts[engine][key] = rate / copies
            loads[engine] += rate / copies
    return [Engine(part) for part in parts]


def judge(
    make_policy: Callable[[], Policy], setup: Setup, demand: Demand, engines: int, *, affine: bool = True,
    seconds: float = 60.0, sample: int = 3, seed: int = 0,
) -> FleetReport:  # fmt: skip
    """Simulate the busiest of `engines` engines and `sample` others."""
    fleet = place(demand, engines, affine=affine)
    by_load = sorted(range(engines), key=lambda i: -fleet[i].rate)
    others = by_load[1:]
    chosen = by_load[:1] + random.Random(seed).sample(others, min(sample, len(others)))
    found = [
        _simulate(make_policy, setup, demand, fleet[i], _jobs(demand, engines, i), seconds, seed + i) for i in chosen
    ]
    shares = [r.attainment for r in found if r.attainment is not None]
    return FleetReport(
        engines=engines,
        busiest_rate=fleet[by_load[0]].rate,
        mean_rate=demand.rate / engines,
        most_adapters=max(sum(a is not None for _, a in engine.rates) for engine in fleet),
        worst_attainment=min(shares, default=None),
        training_rate=engines * sum(r.training_rate for r in found) / len(found),
    )


def engines_needed(
    make_policy: Callable[[], Policy], setup: Setup, demand: Demand, *, affine: bool = True,
    seconds: float = 60.0, sample: int = 3, seed: int = 0,
) -> FleetReport:  # fmt: skip
    """The smallest fleet, to within a sixteenth, that keeps 99% of requests inside both promises and trains enough.

    Raises:
        ValueError: no fleet of any sensible size does.
    """

    def tried(engines: int) -> tuple[bool, FleetReport]:
        made = judge(make_policy, setup, demand, engines, affine=affine, seconds=seconds, sample=sample, seed=seed)
        holds = made.worst_attainment is None or made.worst_attainment >= ATTAINMENT
        return holds and made.training_rate >= demand.training, made

    low, high = 0, 1
    while not (found := tried(high))[0]:
        low, high = high, 2 * high
        if high > _MOST:
            raise ValueError(f"not even {_MOST} engines keep the promises and train as much as is asked")
    best = found[1]
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        holds, made = tried(middle)
        if holds:
            high, best = middle, made
        else:
            low = middle
    return best


def _simulate(make_policy: Callable[[], Policy], setup: Setup, demand: Demand, engine: Engine,
              jobs: Sequence[TrainingJob], seconds: float, seed: int) -> Report:  # fmt: skip
    rng = random.Random(seed)
    times = gamma(rng, engine.rate, seconds + _WARM_UP, demand.cv)
    trace = Trace(times, seed, demand.lengths, engine if engine.rates else None, setup.ttft)
    return report(simulate(make_policy, setup, trace, jobs, seconds=seconds + _WARM_UP, seed=seed), _WARM_UP)


def _jobs(demand: Demand, engines: int, engine: int) -> list[TrainingJob]:
    """Jobs go round: engine i has every job whose number is i, modulo the engines."""
    job = TrainingJob("")
    return [replace(job, name=f"j{n}", tenant=f"t{n % demand.tenants}") for n in range(engine, demand.jobs, engines)]


def _shares(count: int, power: float) -> list[float]:
    weights = [(i + 1) ** -power for i in range(count)]
    whole = sum(weights)
    return [w / whole for w in weights]


def _scores(key: int, engines: int) -> NDArray[np.uint64]:
    """A mixed 64-bit number for (key, engine); the smallest wins. (The finaliser of splitmix64.)"""
    with np.errstate(over="ignore"):
        z = np.arange(engines, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ np.uint64(key * 0xD1342543DE82EF95 & 0xFFFFFFFFFFFFFFFF)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
