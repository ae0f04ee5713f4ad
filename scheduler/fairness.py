"""Who has had how much of the device: one virtual counter a tenant, in device seconds divided by its weight.

It may assume that `meet` sees every state before anything is asked about it, and that charges come from measured
iterations. It never decides what runs: it says whose turn it is.

The counters are those of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with device seconds in
the place of tokens, so that prompts, decodes and training units are one currency. A tenant that comes back is lifted
to the least-served tenant that stayed, less a small credit: it cannot save up idle time, and a job between two of its
steps, or a client between two requests, does not lose its turn. Who only trains gets what requests leave, so its
counter may stand far behind theirs: with its first request it is lifted to the least-served tenant that asks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from copy import copy

from coserve.scheduler.state import RequestState, SweepState


class FairShare:
    """Counters only grow. `credit`: weighted seconds that a returning tenant may be behind the others; `remembered`:
    seconds after which one that stays away is no longer reckoned with; `level`: weighted seconds by which counters may
    differ and still be level (0: they are not)."""

    def __init__(self, credit: float, remembered: float, level: float = 0.0) -> None:
        self._credit, self._remembered, self._step = credit, remembered, level
        self._served: dict[str, float] = {}
        self._weights: dict[str, float] = {}  # of the tenants that are there
        self._asking: set[str] = set()  # those of them that have requests
        self._level = 0.0  # the least-served of those that were last there
        self._asked = 0.0  # the least-served of those that last had requests; of the others, where it is more
        self._lately: dict[str, tuple[float, float]] = {}  # tenant -> when it last had a request, and its weight
        self.row_seconds = 1e-3  # what a prompt row costs, as the planner expects

    def copy(self) -> FairShare:
        """One that goes its own way from here."""
        other = copy(self)
        other._served, other._lately = dict(self._served), dict(self._lately)  # all else is replaced, never changed
        return other

    def meet(self, now: float, asking: Mapping[str, float], sweeps: Iterable[SweepState]) -> None:
        """Who has something to run now: tenants with requests and their weights, and those that train. Lifts those that
        had nothing, the last time."""
        there = {**asking, **{job.tenant: job.weight for sweep in sweeps for job in sweep.jobs}}
        if there.keys() != self._weights.keys() or asking.keys() != self._asking:
            self._take_levels()  # of those that were there
            stayed = [self._served[t] for t in there if t in self._weights]
            asked = [self._served[t] for t in asking if t in self._asking]
            level = max(0.0, min(stayed, default=self._level) - self._credit)
            asked_level = max(0.0, min(asked, default=self._asked) - self._credit)
            for tenant in there:
                if tenant in asking and tenant not in self._asking:
                    self._served[tenant] = max(self._served.get(tenant, 0.0), asked_level)
                elif tenant not in self._weights:
                    self._served[tenant] = max(self._served.get(tenant, 0.0), level)
            self._forget(there, asked_level)
            self._asking = set(asking)
        self._weights = there
        self._take_levels()
        self._lately.update({tenant: (now, weight) for tenant, weight in asking.items()})
        if len(self._lately) > len(asking):
            self._lately = {t: seen for t, seen in self._lately.items() if seen[0] >= now - self._remembered}

    def _take_levels(self) -> None:
        if self._weights:
            self._level = min(map(self._served.__getitem__, self._weights))
        if self._asking:
            self._asked = min(map(self._served.__getitem__, self._asking))
        else:
            self._asked = max(self._asked, self._level)

    def _forget(self, there: Mapping[str, float], level: float) -> None:
        """Of tenants that are away and would be lifted if they asked nothing needs to be known."""
        if len(self._served) > 2 * len(there) + 64:
            self._served = {t: v for t, v in self._served.items() if t in there or v > level}

    @property
    def tenants(self) -> int:
        """How many are there."""
        return len(self._weights)

    @property
    def shared(self) -> bool:
        """Whether more than one tenant had requests lately."""
        return len(self._lately) > 1

    def parts(self, whole: float) -> dict[str, float]:
        """`whole`, divided by weight among the tenants that had requests lately."""
        weights = sum(weight for _, weight in self._lately.values())
        return {tenant: whole * weight / weights for tenant, (_, weight) in self._lately.items()}

    def is_least(self, tenant: str) -> bool:
        """Whether nobody who has requests has been served less."""
        return self.served(tenant) <= self._asked

    def served(self, tenant: str) -> float:
        """Weighted seconds; of a tenant that was never there, those that it would begin with."""
        served = self._served.get(tenant)
        return max(0.0, self._level - self._credit) if served is None else served

    def served_of(self, tenants: Iterable[str]) -> dict[str, float]:
        """Of each of them."""
        served, unknown = self._served, max(0.0, self._level - self._credit)
        return {tenant: served.get(tenant, unknown) for tenant in tenants}

    def turn(self, served: float) -> float:
        """Who has been served so much goes before whoever has a larger one, and is level with those of the same."""
        return served // self._step if self._step else served

    def turns(self, served: Mapping[str, float]) -> Mapping[str, float]:
        """The turn of each tenant, by what it has been served."""
        step = self._step
        return {tenant: seconds // step for tenant, seconds in served.items()} if step else served

    def charge(self, seconds: Mapping[str, float]) -> None:
        """Device seconds by tenant, of those that are there; what an iteration outside of plans took (a calibration)
        is nobody's."""
        for tenant, spent in seconds.items():
            if tenant in self._weights:
                self._served[tenant] += spent / self._weights[tenant]

    def cost(self, request: RequestState) -> float:
        """Weighted seconds of the rest of a prompt, as expected."""
        return (request.total_tokens - request.computed_tokens) * self.row_seconds / request.weight

    def order_sweeps(self, sweeps: tuple[SweepState, ...]) -> tuple[SweepState, ...]:
        """The least-served tenant's first, else as they came. A sweep of several tenants goes with the least served."""
        if len(sweeps) < 2 or len(self._weights) < 2:
            return sweeps
        return tuple(sorted(sweeps, key=self._served_of))

    def not_ahead(self, sweeps: tuple[SweepState, ...], tenants: Collection[str]) -> tuple[SweepState, ...]:
        """Those of `sweeps`, which are in order, of whom no one of `tenants` was served less."""
        if not tenants or len(self._weights) < 2:
            return sweeps
        level = min(map(self.served, tenants))
        return sweeps[: bisect_right(sweeps, level, key=self._served_of)]

    def _served_of(self, sweep: SweepState) -> float:
        if len(sweep.jobs) == 1:
            served = self._served.get(sweep.jobs[0].tenant)
            return self.served(sweep.jobs[0].tenant) if served is None else served
        return min((self.served(job.tenant) for job in sweep.jobs), default=0.0)

    def order_running(self, requests: list[RequestState]) -> list[RequestState]:
        """The least-served tenant's first, else as they came."""
        if len(self._weights) < 2:
            return requests
        served = self._served
        return sorted(requests, key=lambda r: served[r.tenant])
