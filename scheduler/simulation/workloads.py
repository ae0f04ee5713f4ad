"""What arrives: generation requests as a trace or from clients that wait for their answers, and finetuning jobs.

All draws come from one seed. Shapes follow what is published of real traces (bursty gamma arrivals, load that goes
with the hour, few adapters that get most requests); the numbers are parameters, not a copy of any trace.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from coserve.scheduler.simulation.streams import Stream


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output tokens: lognormal around these means, cut at `most` times them; spread 0 is constant."""

    prompt: int = 64
    outputs: int = 64
    spread: float = 0.0
    most: float = 4.0

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return self._one(rng, self.prompt), self._one(rng, self.outputs)

    def _one(self, rng: random.Random, mean: int) -> int:
        if not self.spread:
            return mean
        drawn = mean * rng.lognormvariate(-(self.spread**2) / 2, self.spread)
        return max(1, round(min(drawn, self.most * mean)))


class Senders(Protocol):
    """Who sends the next request."""

    def chooser(self, rng: random.Random) -> Callable[[], tuple[str, float, str | None, str]]:
        """Draws (tenant, weight, adapter, class)."""


@dataclass(frozen=True, slots=True)
class Population:
    """Who sends: tenants and adapters, the i-th as often as i ** -power says; every tenant has adapters of its own."""

    tenants: int = 1
    adapters: int = 0  # a tenant
    power: float = 1.0
    batch_share: float = 0.0  # of requests that are of the class `batch`
    weights: tuple[float, ...] = ()  # of the first tenants; 1 for the others

    def chooser(self, rng: random.Random) -> Callable[[], tuple[str, float, str | None, str]]:
        """Draws (tenant, weight, adapter, class)."""
        tenants = _Popular(self.tenants, self.power, rng)
        adapters = _Popular(self.adapters, self.power, rng) if self.adapters else None

        def choose() -> tuple[str, float, str | None, str]:
            tenant = tenants.draw()
            weight = self.weights[tenant] if tenant < len(self.weights) else 1.0
            adapter = f"t{tenant}/a{adapters.draw()}" if adapters else None
            return f"t{tenant}", weight, adapter, "batch" if rng.random() < self.batch_share else "interactive"

        return choose


@dataclass(frozen=True, slots=True)
class Sender:
    """One tenant that asks the base model, interactively."""

    tenant: str
    weight: float = 1.0

    def chooser(self, rng: random.Random) -> Callable[[], tuple[str, float, str | None, str]]:
        """Draws (tenant, weight, adapter, class)."""
        return lambda: (self.tenant, self.weight, None, "interactive")


class _Popular:
    def __init__(self, count: int, power: float, rng: random.Random) -> None:
        self._range, self._rng = range(count), rng
        self._sums = list(accumulate((i + 1) ** -power for i in range(count)))

    def draw(self) -> int:
        return self._rng.choices(self._range, cum_weights=self._sums)[0]


# --------------------------------------------------------------------------- arrival times, one a call


def poisson(rng: random.Random, rate: float, seconds: float) -> list[float]:
    return gamma(rng, rate, seconds, 1.0)


def gamma(rng: random.Random, rate: float, seconds: float, cv: float) -> list[float]:
    """Gaps with mean 1/rate and coefficient of variation `cv`: 1 is Poisson, 8 comes in bursts."""
    shape = 1.0 / cv**2
    times, now = [], 0.0
    while rate > 0.0:
        now += rng.gammavariate(shape, 1.0 / (rate * shape))
        if now >= seconds:
            break
        times.append(now)
    return times


def bursts(rng: random.Random, rate: float, seconds: float, every: float = 120.0, factor: float = 8.0,
           share: float = 0.15) -> list[float]:  # fmt: skip
    """A calm Poisson stream with bursts of `factor` times its rate, `share` of the time; the mean rate is `rate`."""
    calm = rate / (1.0 - share + share * factor)
    times, now = [], 0.0
    while now < seconds:
        quiet = rng.expovariate(1.0 / (every * (1.0 - share)))
        loud = rng.expovariate(1.0 / (every * share))
        times += [now + t for t in poisson(rng, calm, quiet)]
        times += [now + quiet + t for t in poisson(rng, calm * factor, loud)]
        now += quiet + loud
    return [t for t in times if t < seconds]


def diurnal(rng: random.Random, rate: float, seconds: float, day: float = 600.0, depth: float = 0.8) -> list[float]:
    """Poisson with a rate that swings once a `day` between (1 − depth) and (1 + depth) of the mean."""
    most = rate * (1.0 + depth)
    return [
        t for t in poisson(rng, most, seconds)
        if rng.random() * (1.0 + depth) < 1.0 - depth * math.cos(2.0 * math.pi * t / day)
    ]  # fmt: skip


# --------------------------------------------------------------------------- workloads


class Workload(Protocol):
    def begin(self) -> list[Stream]:
        """Requests known from the start, by time of arrival."""

    def after(self, stream: Stream, now: float) -> Stream | None:
        """What a client sends when `stream` has ended."""


class Trace:
    """Requests at given times, whatever becomes of them."""

    def __init__(self, times: Iterable[float], seed: int, lengths: Lengths | None = None,
                 senders: Senders | None = None, ttft: float = 1.0) -> None:  # fmt: skip
        rng = random.Random(seed)
        lengths = lengths or Lengths()
        self._streams = _requests(((at, *lengths.draw(rng)) for at in sorted(times)), rng, senders, ttft)

    @classmethod
    def replay(cls, requests: Iterable[tuple[float, int, int]], seed: int, senders: Senders | None = None,
               ttft: float = 1.0) -> Trace:  # fmt: skip
        """Recorded requests: (seconds, prompt tokens, output tokens)."""
        trace = cls((), seed)
        trace._streams = _requests(sorted(requests), random.Random(seed), senders, ttft)
        return trace

    def begin(self) -> list[Stream]:
        return list(self._streams)

    def after(self, stream: Stream, now: float) -> Stream | None:
        return None


def _requests(drawn: Iterable[tuple[float, int, int]], rng: random.Random, senders: Senders | None,
              ttft: float) -> list[Stream]:  # fmt: skip
    choose = (senders or Population()).chooser(rng)
    streams = []
    for i, (at, prompt, outputs) in enumerate(drawn):
        tenant, weight, adapter, slo_class = choose()
        streams.append(
            Stream(f"{tenant}-r{i}", at, prompt, outputs, slo_class, adapter, ttft, tenant=tenant, weight=weight)
        )
    return streams


class ClosedLoop:
    """`count` clients, each with one request at a time and `pause` seconds between them."""

    def __init__(self, count: int, seed: int, lengths: Lengths | None = None, ttft: float = 2.0,
                 pause: float = 0.01, tenant: str = "t", begins: float = 0.0, weight: float = 1.0) -> None:  # fmt: skip
        self._weight = weight
        self._count, self._rng, self._lengths = count, random.Random(seed), lengths or Lengths()
        self._ttft, self._pause, self._tenant, self._begins = ttft, pause, tenant, begins
        self._sent = 0

    def begin(self) -> list[Stream]:
        return [self._next(self._begins) for _ in range(self._count)]

    def after(self, stream: Stream, now: float) -> Stream | None:
        return self._next(now + self._pause) if stream.tenant == self._tenant else None

    def _next(self, at: float) -> Stream:
        prompt, outputs = self._lengths.draw(self._rng)
        self._sent += 1
        return Stream(
            f"{self._tenant}-{self._sent}", at, prompt, outputs, ttft=self._ttft, tenant=self._tenant,
            weight=self._weight,
        )  # fmt: skip


class Together:
    """Several workloads at once. Their requests must have names of their own."""

    def __init__(self, workloads: Sequence[Workload]) -> None:
        self._workloads = workloads

    def begin(self) -> list[Stream]:
        return sorted((s for w in self._workloads for s in w.begin()), key=lambda s: s.arrived)

    def after(self, stream: Stream, now: float) -> Stream | None:
        return next((s for s in (w.after(stream, now) for w in self._workloads) if s is not None), None)


@dataclass
class TrainingJob:
    """A finetuning job: steps of `batch` sequences of `length` rows, of which `labels` bear a loss."""

    name: str
    batch: int = 4
    length: int = 256
    labels: int = 64
    tenant: str = "t"
    weight: float = 1.0
    priority: str = "normal"
    arrives: float = 0.0
    steps: int | None = None  # None: for ever
    pages: int = 1  # of its adapter
    done: list[float] = field(default_factory=list)  # when each step was done
    ready_at: float = 0.0  # when its next sweep may begin
    sweep: int | None = None  # the live one
    lost: int = 0  # steps begun and lost to a restart

    @property
    def rows(self) -> int:
        return self.batch * self.length

    @property
    def finished(self) -> bool:
        return self.steps is not None and len(self.done) >= self.steps
