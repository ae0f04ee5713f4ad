"""What the engine expects of a job that trains, put into the job as it is shown. Pure.

The engine reports about once a second. Where it has said nothing of a job (it is just being opened, or the engine is
away), the job shows what its latest steps told.
"""

from __future__ import annotations

from dataclasses import replace

from coserve.server.store.jobs import Job
from coserve.server.store.transitions import RUNNING
from coserve.server.wire.messages import Stats


def with_outlook(job: Job, report: Stats | None, now: float, wall: float) -> Job:
    """`now` is the clock of the report, `wall` the same moment in unix seconds; `report` None: there is no engine."""
    found = next((one for one in report.jobs if one.job_id == job.id), None) if report is not None else None
    if report is None or found is None or job.status != RUNNING:
        return job
    if found.seconds is None or found.tokens_per_second is None:
        return replace(
            job, progress={**job.progress, "eta_seconds": None, "reason": found.waits}, estimated_finish=None
        )
    left = max(0.0, found.seconds - (now - report.time))
    progress = {
        **job.progress, "eta_seconds": round(left, 1), "expected_tokens_per_second": round(found.tokens_per_second, 2),
    }  # fmt: skip
    return replace(job, progress=progress, estimated_finish=round(wall + left))
