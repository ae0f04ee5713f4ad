"""The changes of a finetuning job that the gateway makes by itself, each with the event that tells of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coserve.server.gateway.job_queue import CRASHES_ALLOWED
from coserve.server.gateway.job_spec import resolved_hyperparameters, supervised
from coserve.server.store.job_events import NewEvent
from coserve.server.store.jobs import Job, JobChange
from coserve.server.store.transitions import CANCELLED, FAILED, PAUSED, QUEUED


def failed(code: str, message: str, param: str | None = None) -> JobChange:
    error = {"code": code, "message": message, "param": param}
    return JobChange(status=FAILED, error=error, events=[NewEvent(message, level="error")])


def validated(job: Job, spec: dict[str, Any], total_steps: int, warnings: Sequence[str]) -> JobChange:
    """From here on the job shows the numbers that it trains with, where it said `auto`."""
    hyperparameters = resolved_hyperparameters(job.hyperparameters)
    events = [NewEvent(warning, level="warn") for warning in warnings]
    return JobChange(
        status=QUEUED, spec=spec, progress={"step": 0, "total_steps": total_steps},
        hyperparameters=hyperparameters, method=supervised(hyperparameters),
        events=[*events, NewEvent("Files validated, moving job to queued state")],
    )  # fmt: skip


def cancelled(job: Job) -> JobChange:
    progress = {**job.progress, "eta_seconds": None, "reason": None}
    return JobChange(status=CANCELLED, progress=progress, events=[NewEvent("Fine-tuning job cancelled")])


def paused() -> JobChange:
    return JobChange(status=PAUSED, clear_requested=True, events=[NewEvent("Fine-tuning job paused")])


def queued_again(job: Job, why: str) -> JobChange:
    """A paused job goes back to the queue."""
    progress = {**job.progress, "reason": None}
    return JobChange(status=QUEUED, clear_requested=True, progress=progress, events=[NewEvent(why)])


def gave_way(job: Job) -> JobChange:
    """It has a checkpoint, and its slot is another tenant's."""
    text = "The job gives its slot to another tenant's and goes on from here when one is free"
    return JobChange(status=QUEUED, progress={**job.progress, "reason": None}, events=[NewEvent(text)])


def crashed(job: Job) -> JobChange:
    """The engine died while it had the job: it goes on from its checkpoint, or fails if that happens time and again."""
    crashes = job.crashes + 1
    if crashes >= CRASHES_ALLOWED:
        return failed(
            "engine_crashed", f"The engine crashed {crashes} times while this job ran, without progress in between."
        )
    message = "The engine restarted; the job goes on from its last checkpoint"
    return JobChange(
        crashes=crashes,
        progress={**job.progress, "reason": "engine_restarted"},
        events=[NewEvent(message, level="warn")],
    )
