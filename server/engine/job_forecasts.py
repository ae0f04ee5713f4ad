"""What the engine's jobs still have to run, for the scheduler's forecast; and what the gateway is told of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from coserve.scheduler.forecast import JobForecast, JobWork
from coserve.scheduler.rates import WorkShape
from coserve.server.engine.running_job import RunningJob
from coserve.server.wire.messages import JobReport


def works(jobs: Iterable[RunningJob], weight: Callable[[str], float], window: int, layers: int) -> tuple[JobWork, ...]:
    """Of the jobs that train, or are about to. `window`: rows of a unit, at most."""
    found = (_work(running, weight, window, layers) for running in jobs)
    return tuple(work for work in found if work is not None)


def _work(running: RunningJob, weight: Callable[[str], float], window: int, layers: int) -> JobWork | None:
    job = running.job
    if job is None or job.state != "running" or running.stop is not None or running.waits is not None:
        return None
    left = job.work_left(running.batch or running.reported)
    # Rows of the step under way that are in no sweep yet; as many of them bear loss as of the others.
    waiting = sum(len(sequence.input_ids) for part in running.waiting for sequence in part)
    evaluates = running.batch is not None and running.batch.kind == "eval"
    rows, eval_rows = left.tokens + waiting * (not evaluates), left.eval_tokens + waiting * evaluates
    step = WorkShape(max(1, round(left.step_tokens)), window, layers)
    return JobWork(
        job.job_id, job.tenant, weight(job.tenant), job.priority, step,
        round(rows), round(rows * left.bearing), round(eval_rows), round(eval_rows * left.eval_bearing),
    )  # fmt: skip


def reports(forecasts: Iterable[JobForecast], waits: Mapping[str, str]) -> tuple[JobReport, ...]:
    """`waits`: of jobs that do not train now, and why."""
    return (
        *(JobReport(one.job_id, one.tokens_per_second, one.seconds) for one in forecasts if one.job_id not in waits),
        *(JobReport(job_id, waits=reason) for job_id, reason in waits.items()),
    )
