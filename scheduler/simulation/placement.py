"""What all tenants together want, and which engine of a fleet gets which part of it.

An adapter goes to the engine that scores highest for it (rendezvous hashing: another engine moves only what it takes
over), unless that engine would carry more than `slack` times the mean load; then to the next one. An adapter too
popular for one engine is spread over as many as its share needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import ceil

import numpy as np
from numpy.typing import NDArray

from coserve.scheduler.simulation.workloads import Lengths


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


@dataclass(frozen=True)
class Engine:
    """One engine's part: rates by (tenant, adapter)."""

    rates: dict[tuple[int, int | None], float]

    @cached_property
    def rate(self) -> float:
        return sum(self.rates.values())

    @cached_property
    def adapters(self) -> int:
        return sum(adapter is not None for _, adapter in self.rates)

    def strain(self, places: int) -> float:
        """Requests a second; one for an adapter that is not among the `places` most asked counts twice: it is loaded
        for it, and shares a pass with few others."""
        rates = sorted((rate for (_, adapter), rate in self.rates.items() if adapter is not None), reverse=True)
        return self.rate + sum(rates[places:])

    def chooser(self, rng: random.Random) -> Callable[[], tuple[str, float, str | None, str]]:
        """Draws (tenant, weight, adapter, class), as `Population` does."""
        keys, weights = list(self.rates), list(accumulate(self.rates.values()))

        def choose() -> tuple[str, float, str | None, str]:
            ((tenant, adapter),) = rng.choices(keys, cum_weights=weights)
            return f"t{tenant}", 1.0, None if adapter is None else f"t{tenant}/a{adapter}", "interactive"

        return choose


def place(demand: Demand, engines: int, slack: float = 1.25, affine: bool = True) -> list[Engine]:
    """Who goes where. Without affinity every request goes to any engine, and all engines are alike."""
    rates = demand.rates()
    if not affine:
        return [Engine({key: rate / engines for key, rate in rates.items()})] * engines
    parts: list[dict[tuple[int, int | None], float]] = [{} for _ in range(engines)]
    limit = slack * demand.rate / engines
    loads = np.zeros(engines)
    order = sorted(rates.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or 0))
    for number, (key, rate) in enumerate(order):
        copies = min(engines, ceil(rate / limit))
        fitting = np.flatnonzero(loads + rate / copies <= limit * (1.0 + 1e-9))
        scores = _scores(number, engines)[fitting]
        if len(fitting) < copies:  # nowhere under the limit: where there is most room
            chosen = np.argsort(loads, kind="stable")[:copies]
        elif copies == 1:
            chosen = fitting[[int(scores.argmin())]]
        else:
            chosen = fitting[np.argsort(scores, kind="stable")[:copies]]
        loads[chosen] += rate / copies
        for engine in chosen.tolist():
            parts[engine][key] = rate / copies
    return [Engine(part) for part in parts]


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
