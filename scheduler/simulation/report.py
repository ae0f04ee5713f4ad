"""What a run was worth: promises kept, latencies, training, service by tenant. Pure functions of a ledger.

A request that a restart cut off, or whose first token is overdue at the end, is a miss. Training counts tokens of
finished optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coserve.scheduler.simulation.ledger import Iteration, Ledger, Setup
from coserve.scheduler.simulation.streams import Stream

ATTAINMENT = 0.99  # of requests inside both promises: a load that keeps less is too much


@dataclass(frozen=True, slots=True)
class Report:
    """Times in seconds, rates a second, shares 0 … 1; None where nothing was there to measure."""

    requests: int  # judged: ended, or broken already
    attainment: float | None  # share of requests with first token and mean seconds a token inside both promises
    iterations_inside: float | None  # of those that carried a running stream: ended within their budget
    gaps_inside: float | None  # of the inter-token latencies: within the promise
    itl_p50: float | None
    itl_p99: float | None
    itl_max: float | None
    ttft_p50: float | None
    ttft_p99: float | None
    output_rate: float  # generated tokens
    training_rate: float  # trained tokens
    training_share: float  # of the time
    serving_share: float
    idle_share: float
    prediction_error: float | None  # median of |measured ÷ predicted − 1|


def report(ledger: Ledger, begin: float = 0.0) -> Report:
    """Of what happened from second `begin` to the end.

    Raises:
        ValueError: nothing lies between the two.
    """
    span = ledger.seconds - begin
    if span <= 0.0:
        raise ValueError(f"the run ended after {ledger.seconds} s: there is nothing from second {begin} on")
    kept = [_kept(s, ledger.setup, ledger.seconds) for s in ledger.streams if s.arrived >= begin]
    judged = [k for k in kept if k is not None]
    gaps = [seconds for at, seconds in ledger.gaps if at >= begin]
    firsts = [s.first_at - s.arrived for s in ledger.streams if s.first_at is not None and s.first_at >= begin]
    iterations = [i for i in ledger.iterations if i.began >= begin]
    training = sum(i.training for i in iterations)
    serving = sum(i.seconds for i in iterations) - training
    return Report(
        requests=len(judged),
        attainment=_share(judged),
        iterations_inside=_share([_inside(i, ledger.setup.itl) for i in iterations if i.decodes]),
        gaps_inside=_share([g <= ledger.setup.itl for g in gaps]),
        itl_p50=percentile(gaps, 0.5),
        itl_p99=percentile(gaps, 0.99),
        itl_max=max(gaps, default=None),
        ttft_p50=percentile(firsts, 0.5),
        ttft_p99=percentile(firsts, 0.99),
        output_rate=(len(gaps) + len(firsts)) / span,
        training_rate=training_rate(ledger, begin),
        training_share=training / span,
        serving_share=serving / span,
        idle_share=max(0.0, 1.0 - (training + serving) / span),
        prediction_error=percentile([abs(i.seconds / i.predicted - 1.0) for i in iterations if i.predicted], 0.5),
    )


def training_rate(ledger: Ledger, begin: float = 0.0) -> float:
    """Trained tokens a second: of each job, the steps between the last one that was done before `begin` (or the job's
    arrival) and its last one, over the time between those two. 0 without a finished step."""
    total = 0.0
    for job in ledger.jobs:
        start = max([job.arrives, *(at for at in job.done if at <= begin)])
        steps = [at for at in job.done if at > start]
        if steps:
            total += len(steps) * job.rows / (steps[-1] - start)
    return total


def service(ledger: Ledger) -> dict[str, float]:
    """Device seconds by tenant, serving and training together, divided by the tenant's weight."""
    weights = {s.tenant: s.weight for s in ledger.streams} | {j.tenant: j.weight for j in ledger.jobs}
    return {tenant: sum(seconds) / weights[tenant] for tenant, seconds in ledger.service.items()}


def retention(beside: Report, alone: Report) -> float | None:
    """Training kept beside requests, of what the job reaches alone."""
    return beside.training_rate / alone.training_rate if alone.training_rate else None


def best_alone(reports: Sequence[Report]) -> float | None:
    """The most tokens a second of loads without training that keep 99% of requests inside both promises; None if none
    of them does."""
    rates = [r.output_rate for r in reports if r.attainment is not None and r.attainment >= ATTAINMENT]
    return max(rates, default=None)


def largest_rate(attainment: Callable[[float], float | None], low: float, steps: int = 7) -> float | None:
    """The largest rate with 99% attainment that `steps` trials find, doubling `low` and then halving the gap; None if
    not even `low` has that. `attainment(rate)` ought to fall with the rate."""

    def holds(rate: float) -> bool:
        share = attainment(rate)
        return share is not None and share >= ATTAINMENT

    if not holds(low):
        return None
    high = 2.0 * low
    while steps > 0 and holds(high):
        low, high, steps = high, 2.0 * high, steps - 1
    for _ in range(steps):
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _kept(stream: Stream, setup: Setup, end: float) -> bool | None:
    """None while the request is under way and has broken nothing."""
    if stream.cut or (stream.first_at or end) - stream.arrived > stream.ttft:
        return False
    if stream.first_at is None or stream.finished_at is None:
        return None
    return stream.generated < 2 or (stream.finished_at - stream.first_at) / (stream.generated - 1) <= setup.itl


def _inside(iteration: Iteration, itl: float) -> bool:
    """Within its budget; within the promise where the policy predicted nothing."""
    return iteration.seconds <= (min(itl, iteration.budget) if iteration.predicted else itl)


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
