"""What an engine event means for a finetuning job: the API's events, checkpoints, statuses and progress.

Pure: from the job as it is and one record of its event file to what must be stored. Copying folders and writing
rows are the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coserve.server.gateway.job_spec import checkpoint_model_id
from coserve.server.store.checkpoints import NewCheckpoint
from coserve.server.store.job_events import NewEvent
from coserve.server.store.jobs import Job, JobChange
from coserve.server.store.transitions import FAILED, FINAL, PAUSED, QUEUED, RUNNING, SUCCEEDED

PACE_STEPS = 20
STORAGE_FULL = "storage_full"
_RELEASING = frozenset({"paused", "cancelled", "failed", "finished"})
_STEP_METRICS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True, slots=True)
class Published:
    """A folder that becomes a version of the job's adapter."""

    step: int
    path: str  # relative to the data directory
    digest: str


@dataclass(frozen=True, slots=True)
class Translation:
    change: JobChange = field(default_factory=JobChange)
    checkpoint: NewCheckpoint | None = None
    pruned_step: int | None = None
    published: Published | None = None
    result_path: str | None = None  # result.csv, relative to the data directory
    released: bool = False  # the engine no longer has the job


class Pace:
    """How fast a job steps, over its latest steps since it was (re)started."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps: deque[tuple[float, int]] = deque(maxlen=PACE_STEPS)  # (seconds, tokens)

    def restart(self, at: float) -> None:
        self._last = at

    def step(self, at: float, tokens: int) -> None:
        if self._last is not None and at > self._last:
            self._steps.append((at - self._last, tokens))
        self._last = at

    @property
    def seconds_per_step(self) -> float | None:
        return sum(seconds for seconds, _ in self._steps) / len(self._steps) if self._steps else None

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds else None


def translate(job: Job, record: Mapping[str, Any], pace: Pace) -> Translation:
    """What `record` brings about. A job that has ended stays as it ended, whatever still comes of it."""
    kind, data = record["kind"], record.get("data") or {}
    released = kind in _RELEASING
    if kind == "started":
        pace.restart(record["created_at"])
    if job.status in FINAL:
        return Translation(released=released)
    told = _event(record)
    # Whatever comes of a job that was only queued says that the engine runs it.
    running = RUNNING if job.status == QUEUED else None
    match kind:
        case "started":
            step = data.get("step", 0)  # where it goes on from
            progress = {**job.progress, "step": step, "total_steps": data["total_steps"], "reason": None}
            return Translation(JobChange(status=running, progress=progress, events=[told]))
        case "step":
            return _step(job, record, data, pace, running)
        case "checkpoint":
            return Translation(
                JobChange(status=running, events=[_event(record, step=data["step"])]),
                checkpoint=_checkpoint(job, record),
            )
        case "pruned":
            return Translation(JobChange(status=running), pruned_step=data["step"])
        case "published":
            return Translation(
                JobChange(status=running, events=[_event(record, step=data["step"], digest=data["digest"])]),
                published=Published(data["step"], data["path"], data["digest"]),
            )
        case "paused":
            return _paused(job, data, told)
        case "cancelled":
            return Translation(JobChange(events=[told]), released=True)
        case "failed":
            error = {"code": data["code"], "message": data["message"], "param": None}
            change = JobChange(
                status=FAILED,
                error=error,
                progress=_ended(job),
                trained_tokens=data.get("trained_tokens"),
                events=[told],
            )
            return Translation(change, released=True)
        case "finished":
            return _finished(job, record, data)
        case _:
            return Translation(JobChange(events=[told] if record.get("message") else []))


def _event(record: Mapping[str, Any], **data: Any) -> NewEvent:
    return NewEvent(
        str(record.get("message") or record["kind"]), level=record.get("level", "info"), data=data or None,
        created_at=int(record["created_at"]),
    )  # fmt: skip


def _step(job: Job, record: Mapping[str, Any], data: Mapping[str, Any], pace: Pace, running: str | None) -> Translation:
    step, total = data["step"], data["total_steps"]
    pace.step(record["created_at"], data.get("tokens", 0))
    seconds = pace.seconds_per_step
    eta = None if seconds is None else (total - step) * seconds
    furthest = job.progress.get("furthest_step", 0)
    progress = {
        **job.progress, "step": step, "total_steps": total, "loss": data.get("train_loss"),
        "tokens_per_second": None if pace.tokens_per_second is None else round(pace.tokens_per_second, 2),
        "eta_seconds": None if eta is None else round(eta, 1), "reason": None, "furthest_step": max(furthest, step),
    }  # fmt: skip
    metrics = {"step": step, "total_steps": total}
    metrics |= {name: data[name] for name in _STEP_METRICS if data.get(name) is not None}
    event = NewEvent(
        str(record["message"]), level=record.get("level", "info"), type="metrics", data=metrics,
        created_at=int(record["created_at"]),
    )  # fmt: skip
    return Translation(
        JobChange(
            status=running, progress=progress, crashes=0 if job.crashes and step > furthest else None, events=[event],
            estimated_finish=None if eta is None else int(record["created_at"] + eta),
        )
    )  # fmt: skip


def _checkpoint(job: Job, record: Mapping[str, Any]) -> NewCheckpoint:
    data = record["data"]
    return NewCheckpoint(
        step=data["step"],
        model_id=checkpoint_model_id(job.fine_tuned_model or job.id, data["step"]),
        digest=data["digest"],
        path=data["path"],
        metrics={"step": data["step"], **(data.get("metrics") or {})},
        resumable=bool(data.get("resumable", True)),
        created_at=int(record["created_at"]),
    )


def _paused(job: Job, data: Mapping[str, Any], told: NewEvent) -> Translation:
    """A pause that nobody asked for (a shutdown) leaves the job running: it is started again by whoever comes next."""
    full = data.get("reason") == STORAGE_FULL
    if job.status == PAUSED:
        return Translation(JobChange(clear_requested=True), released=True)
    if job.requested != "pause" and not full:
        return Translation(JobChange(progress={**job.progress, "eta_seconds": None}), released=True)
    progress = {
        **job.progress, "eta_seconds": None, "reason": STORAGE_FULL if full else None,
        "room_needed": data.get("needs_bytes"),
    }  # fmt: skip
    change = JobChange(status=PAUSED, clear_requested=True, progress=progress, events=[told])
    return Translation(change, released=True)


def _finished(job: Job, record: Mapping[str, Any], data: Mapping[str, Any]) -> Translation:
    at = int(record["created_at"])
    change = JobChange(
        status=SUCCEEDED,
        trained_tokens=data["trained_tokens"],
        progress=_ended(job) | {"step": data["step"]},
        events=[
            NewEvent(f"New fine-tuned model created: {job.fine_tuned_model}", created_at=at),
            NewEvent("The job has successfully completed", created_at=at),
        ],
    )
    return Translation(
        change, published=Published(data["step"], data["path"], data["digest"]), result_path=data.get("result_file"),
        released=True,
    )  # fmt: skip


def _ended(job: Job) -> dict[str, Any]:
    return {**job.progress, "eta_seconds": None, "reason": None}
