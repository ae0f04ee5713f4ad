"""How many engines a load needs: a few of them are simulated, and the others judged by them.

Engines differ in what they are asked (`placement`): requests a second and how scattered over adapters, together their
*strain*, and jobs. Of those with as many jobs five are simulated, from the most strained to the least; what they keep
of their promises and train is taken for a function of the strain, straight between two of them. Others, drawn at
random, are simulated as well and compared with what was judged of them: that is the judgement's error. The fleet is
large enough when 99% of all requests are inside both promises, and on every engine that was simulated as many (to two
standard errors: of the 150 requests of a minute two or three may be late by chance), and all jobs together train as
fast as asked. So a fleet of thousands takes no longer than one of ten.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, isnan, sqrt

import numpy as np
from numpy.typing import NDArray

from coserve.scheduler.simulation.ledger import Setup
from coserve.scheduler.simulation.placement import Demand, Engine, place
from coserve.scheduler.simulation.policies import Policy
from coserve.scheduler.simulation.report import ATTAINMENT, Report, report
from coserve.scheduler.simulation.run import simulate
from coserve.scheduler.simulation.workloads import Trace, TrainingJob, gamma

_WARM_UP = 5.0


@dataclass(frozen=True, slots=True)
class FleetReport:
    engines: int
    busiest_rate: float  # requests a second
    mean_rate: float
    most_adapters: int  # of one engine
    worst_attainment: float | None  # of the engines that were simulated
    attainment: float | None  # of all requests, judged
    training_rate: float  # tokens a second of all jobs, judged
    simulated: int
    error: float  # of the judgement: the largest difference in attainment of an engine that was drawn to check it
    training_error: float  # mean difference in tokens a second that such an engine trains
    holds: bool  # whether it is large enough for its requests


class Fleet:
    """One placement, and what is known of its engines so far."""

    def __init__(
        self, demand: Demand, engines: int, affine: bool, places: int, run: Callable[[Engine, int, int], Report]
    ) -> None:
        """`places`: of an engine, for adapters; `run` simulates (engine, its jobs, its number)."""
        self.engines, self._run, self._demand = place(demand, engines, affine=affine), run, demand
        self.found: dict[int, Report] = {}
        self._alike: dict[int, list[int]] = defaultdict(list)  # how many jobs -> engines, the most strained first
        self._rates = np.array([engine.rate for engine in self.engines])
        strain = {id(engine): engine.strain(places) for engine in self.engines}  # without affinity all are one
        self._strain = np.array([strain[id(engine)] for engine in self.engines])
        for i in np.argsort(-self._strain, kind="stable").tolist():
            self._alike[self.jobs(i)].append(i)

    def jobs(self, number: int) -> int:
        """Jobs go round: engine i has every job whose number is i, modulo the engines."""
        return len(range(number, self._demand.jobs, len(self.engines)))

    @property
    def representatives(self) -> list[int]:
        """The most strained of all first."""
        chosen = {same[(len(same) - 1) * quarter // 4] for same in self._alike.values() for quarter in range(5)}
        return sorted(chosen, key=lambda i: (-self._strain[i], i))

    def look(self, numbers: Iterable[int], to_the_end: bool = False) -> bool:
        """Simulate these; False if one does not keep its promises, and then none after it unless `to_the_end`."""
        all_keep = True
        for i in numbers:
            if i not in self.found:
                self.found[i] = self._run(self.engines[i], self.jobs(i), i)
            if not _keeps(self.found[i]):
                all_keep = False
                if not to_the_end:
                    break
        return all_keep

    def judged(self, what: Callable[[Report], float | None]) -> NDArray[np.float64]:
        """`what` of every engine, by those with as many jobs that were simulated; not a number where none tells."""
        values = np.full(len(self.engines), np.nan)
        for jobs, alike in self._alike.items():
            known = ((self._strain[i], what(found)) for i, found in self.found.items() if self.jobs(i) == jobs)
            points = sorted((strain, value) for strain, value in known if value is not None)
            if points:
                values[alike] = np.interp(self._strain[alike], *np.array(points).T)
        return values

    def check(self, numbers: Sequence[int]) -> tuple[float, float]:
        """Simulate these after judging them. How wrong that was: the largest difference in attainment, and the mean one
        in tokens a second that an engine trains."""
        kept, trained = (self.judged(what)[numbers] for what in (_attainment, _training))
        self.look(numbers, to_the_end=True)
        found = [self.found[i] for i in numbers]
        pairs = [(judged, r.attainment) for judged, r in zip(kept.tolist(), found, strict=True)]
        missed = [abs(judged - really) for judged, really in pairs if really is not None and not isnan(judged)]
        untrained = [abs(judged - r.training_rate) for judged, r in zip(trained.tolist(), found, strict=True)]
        return max(missed, default=0.0), sum(untrained) / max(1, len(untrained))

    def report(self, errors: tuple[float, float]) -> FleetReport:
        shares = [r.attainment for r in self.found.values() if r.attainment is not None]
        kept = float(np.nansum(self._rates * self.judged(_attainment)))
        return FleetReport(
            engines=len(self.engines),
            busiest_rate=float(self._rates.max()),
            mean_rate=float(self._rates.mean()),
            most_adapters=max(e.adapters for e in self.engines),
            worst_attainment=min(shares, default=None),
            attainment=kept / float(self._rates.sum()) if shares else None,
            training_rate=float(np.nansum(self.judged(_training))),
            simulated=len(self.found),
            error=errors[0],
            training_error=errors[1],
            holds=all(map(_keeps, self.found.values()))
            and (not shares or kept >= ATTAINMENT * float(self._rates.sum())),
        )


def judge(
    make_policy: Callable[[], Policy], setup: Setup, demand: Demand, engines: int, *, affine: bool = True,
    seconds: float = 60.0, sample: int = 3, seed: int = 0,
) -> FleetReport:  # fmt: skip
    """Of a fleet of this size; `sample` engines check the judgement. Of one that is too small no more is looked at."""

    def run(engine: Engine, jobs: int, number: int) -> Report:
        return _simulate(make_policy, setup, demand, engine, jobs, seconds, seed + number)

    fleet, errors = Fleet(demand, engines, affine, setup.max_adapters, run), (0.0, 0.0)
    if fleet.look(fleet.representatives) and np.nansum(fleet.judged(_training)) >= demand.training:
        others = [i for i in range(engines) if i not in fleet.found]
        errors = fleet.check(random.Random(seed).sample(others, min(sample, len(others))))
    return fleet.report(errors)


def engines_needed(
    make_policy: Callable[[], Policy], setup: Setup, demand: Demand, *, affine: bool = True,
    seconds: float = 60.0, sample: int = 3, seed: int = 0, most: int = 1 << 14,
) -> FleetReport:  # fmt: skip
    """The smallest fleet, to within a sixteenth, that is large enough for its requests and trains enough.

    Raises:
        ValueError: no fleet of up to `most` engines does, by twofold steps.
    """

    def tried(engines: int) -> tuple[bool, FleetReport]:
        made = judge(make_policy, setup, demand, engines, affine=affine, seconds=seconds, sample=sample, seed=seed)
        return made.holds and made.training_rate >= demand.training, made

    low = _too_few(make_policy, setup, demand, seconds, seed)
    high = max(1, ceil(1.25 * low))
    while not (found := tried(high))[0]:
        low, high = high, 2 * high
        if high > most:
            raise ValueError(f"not even {most} engines keep the promises and train as much as is asked")
    best = found[1]
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        holds, made = tried(middle)
        if holds:
            high, best = middle, made
        else:
            low = middle
    return best


def _too_few(make_policy: Callable[[], Policy], setup: Setup, demand: Demand, seconds: float, seed: int) -> int:
    """A fleet that cannot do: its engines would each be asked more than one keeps that has no adapters and no jobs. To
    simulate such engines would take long, their queues grow without end."""
    base, rate = replace(demand, tenants=1, adapters=0, jobs=0), 1.0
    while rate < demand.rate:
        engine = Engine({(0, None): rate})
        kept = _simulate(make_policy, setup, base, engine, 0, min(seconds, 30.0), seed).attainment
        if kept is not None and kept < ATTAINMENT:
            return int(demand.rate / rate)
        rate *= 2.0
    return 0


def _keeps(found: Report) -> bool:
    if found.attainment is None:
        return True
    return found.attainment >= ATTAINMENT - 2.0 * sqrt(ATTAINMENT * (1.0 - ATTAINMENT) / found.requests)


def _attainment(found: Report) -> float | None:
    return found.attainment


def _training(found: Report) -> float:
    return found.training_rate


def _simulate(make_policy: Callable[[], Policy], setup: Setup, demand: Demand, engine: Engine, jobs: int,
              seconds: float, seed: int) -> Report:  # fmt: skip
    rng = random.Random(seed)
    times = gamma(rng, engine.rate, seconds + _WARM_UP, demand.cv)
    trace = Trace(times, seed, demand.lengths, engine if engine.rates else None, setup.ttft)
    own = [TrainingJob(f"j{n}", tenant=f"t{(seed + n) % demand.tenants}") for n in range(jobs)]
    ledger = simulate(make_policy, setup, trace, own, seconds=seconds + _WARM_UP, seed=seed)
    # In so short a run several jobs complete few steps or none: what counts here is rows that have come to their end.
    trained = sum(i.train_backward for i in ledger.iterations if i.began >= _WARM_UP)
    return replace(report(ledger, _WARM_UP), training_rate=trained / seconds)
