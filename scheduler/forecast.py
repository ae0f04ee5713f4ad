"""When finetuning jobs will end, and how fast they train: predicted from their work, the model's prices and the rate.

Pure functions. What they assume is what they are told: jobs train on at today's rate, those that wait for a slot do not
begin, and nobody pauses, stops early or fails.

Jobs share the rate as the scheduler shares training: normal ones before low ones, which keep the floor; the tenants of
a priority by weight; and the jobs of one tenant step by step in turn, so that each pays for its own steps. When one
ends, the others have its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.rates import WorkShape, prices, sweep_seconds
from coserve.scheduler.state import SweepState


@dataclass(frozen=True, slots=True)
class JobWork:
    """What of a job is in no sweep yet. Rows are tokens."""

    job_id: str
    tenant: str
    weight: float
    priority: str  # "normal" | "low"
    step: WorkShape  # of an ordinary step
    rows: int  # to train
    labels: int  # of them, those that bear a label
    eval_rows: int = 0  # to evaluate
    eval_labels: int = 0


@dataclass(frozen=True, slots=True)
class JobForecast:
    job_id: str
    tokens_per_second: float  # now
    seconds: float  # to its end


@dataclass(slots=True)
class _Left:
    """A job on its way through the forecast."""

    work: JobWork
    seconds: float  # ideal ones
    round: float  # of them, those of one step
    ends: float = 0.0
    first_rate: float | None = None


def forecast(
    jobs: Sequence[JobWork], sweeps: Sequence[SweepState], model: LatencyModel, head_rows: int, speed: float,
    floor: float,
) -> tuple[JobForecast, ...]:  # fmt: skip
    """One for each job, in the same order. `speed`: ideal seconds a second; `floor`: what low jobs have of a second."""
    live = _live_seconds(sweeps, model, head_rows)
    left = [_left(job, live.get(job.job_id, 0.0), model, head_rows) for job in jobs]
    _run(left, speed, min(floor, 0.5 * speed))
    return tuple(
        JobForecast(one.work.job_id, (one.first_rate or 0.0) * one.work.step.stream / one.round, one.ends)
        for one in left
    )


def _left(job: JobWork, live: float, model: LatencyModel, head_rows: int) -> _Left:
    price = prices(model, job.step, head_rows)
    whole = price.of(job.rows + job.eval_rows, job.labels + job.eval_labels, job.rows)
    step = price.of(job.step.stream, job.labels * job.step.stream / job.rows if job.rows else 0.0, job.step.stream)
    steps = max(1.0, job.rows / max(1, job.step.stream) + live / max(1e-9, step))
    return _Left(job, whole + live, max(1e-9, (whole + live) / steps))


def _live_seconds(sweeps: Sequence[SweepState], model: LatencyModel, head_rows: int) -> dict[str, float]:
    """What sweeps under way still take, by job: alike for those that share one."""
    seconds: dict[str, float] = {}
    for sweep in sweeps:
        price = sweep_seconds(model, sweep, head_rows)
        for job in sweep.jobs:
            seconds[job.job_id] = seconds.get(job.job_id, 0.0) + price / len(sweep.jobs)
    return seconds


def _run(left: Sequence[_Left], speed: float, floor: float) -> None:
    """Let the jobs end, one after the other."""
    now, going = 0.0, list(left)
    while going:
        rates = _rates(going, speed, floor)
        passed = min(one.seconds / rate for one, rate in zip(going, rates, strict=True) if rate > 0.0)
        now += passed
        for one, rate in zip(going, rates, strict=True):
            if one.first_rate is None:
                one.first_rate = rate
            one.seconds -= rate * passed
            one.ends = now
        going = [one for one in going if one.seconds > 1e-9]


def _rates(going: Sequence[_Left], speed: float, floor: float) -> list[float]:
    """Ideal seconds a second, of each job."""
    low = [one.work.priority == "low" for one in going]
    of_low = speed if all(low) else floor
    of_normal = speed - floor if any(low) else speed
    rounds: dict[tuple[bool, str], float] = {}
    weights: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for one, is_low in zip(going, low, strict=True):
        key = is_low, one.work.tenant
        rounds[key] = rounds.get(key, 0.0) + one.round
        weights[is_low][one.work.tenant] = one.work.weight
    return [
        (of_low if is_low else of_normal)
        * (one.work.weight / sum(weights[is_low].values()))
        * (one.round / rounds[is_low, one.work.tenant])
        for one, is_low in zip(going, low, strict=True)
    ]
