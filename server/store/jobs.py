"""Finetuning jobs: creation (with its idempotency record), look-up, and changes of status made by the service.

What the engine reports about a running job goes through `job_progress`. Both write a job's API events in the same
commit as the change that they tell of.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coserve.server.store.database import Database
from coserve.server.store.errors import InvalidTransition
from coserve.server.store.ids import JOB, new_id
from coserve.server.store.job_events import NewEvent, insert_events
from coserve.server.store.rows import Page, dump, load, page
from coserve.server.store.submissions import Submission, find_submission, insert_submission
from coserve.server.store.transitions import CANCELLED, FINAL, PAUSED, VALIDATING, check_transition

_REQUEST_MEANS = {"pause": PAUSED, "cancel": CANCELLED}


@dataclass(frozen=True, slots=True)
class NewJob:
    """A validated request, as the API object will show it. Mappings and sequences are plain JSON."""

    model: str
    training_file: str
    seed: int
    method: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    adapter: Mapping[str, Any]
    training: Mapping[str, Any]
    validation_file: str | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    spec: Mapping[str, Any] | None = None  # internal: what spec.json will hold
    adapter_id: str | None = None
    fine_tuned_model: str | None = None  # internal until the job succeeds: the id that it will have


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    tenant: str
    created_at: int
    status: str
    model: str
    training_file: str
    validation_file: str | None
    seed: int
    suffix: str | None
    metadata: dict[str, str] | None
    method: dict[str, Any]
    hyperparameters: dict[str, Any]
    adapter: dict[str, Any]
    training: dict[str, Any]
    spec: dict[str, Any] | None
    adapter_id: str | None
    fine_tuned_model: str | None  # to be shown only once the job has succeeded
    result_files: tuple[str, ...]
    trained_tokens: int | None
    error: dict[str, Any] | None
    finished_at: int | None
    estimated_finish: int | None
    progress: dict[str, Any]
    requested: str | None  # "pause" | "cancel": asked for by the tenant, not yet done by the engine
    last_seq: int  # the last engine event that was applied
    crashes: int  # engine crashes since the job last made progress


@dataclass(frozen=True, slots=True)
class JobChange:
    """Fields to set on a job; None leaves a field as it is."""

    status: str | None = None
    method: Mapping[str, Any] | None = None
    hyperparameters: Mapping[str, Any] | None = None
    spec: Mapping[str, Any] | None = None
    adapter_id: str | None = None
    fine_tuned_model: str | None = None
    result_files: Sequence[str] | None = None
    trained_tokens: int | None = None
    error: Mapping[str, Any] | None = None
    estimated_finish: int | None = None
    progress: Mapping[str, Any] | None = None
    requested: str | None = None  # "pause" | "cancel"; InvalidTransition if the job has ended
    clear_requested: bool = False  # the engine has done what was asked for
    crashes: int | None = None
    events: Sequence[NewEvent] = field(default=())


class Jobs:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def create(
        self, tenant: str, new: NewJob, *, submission: Submission | None = None, events: Sequence[NewEvent] = (),
        job_id: str | None = None,
    ) -> tuple[Job, bool]:  # fmt: skip
        """Add a job in `validating_files`; (job, True).

        With a `submission` that repeats an earlier one (see `submissions`), that one's job and False. Raises
        IdempotencyConflict for its key with another body. `events` get the job's creation time.
        """
        now = int(self._clock())
        fresh_id = job_id or new_id(JOB)

        def insert(connection: sqlite3.Connection) -> tuple[Job, bool]:
            if submission is not None:
                earlier = find_submission(connection, tenant, submission, now)
                if earlier is not None:
                    job = find_job(connection, tenant, earlier)
                    if job is not None:
                        return job, False
            connection.execute(
                "INSERT INTO jobs (id, tenant, created_at, status, model, training_file, validation_file, seed, suffix,"
                " metadata, method, hyperparameters, adapter, training, spec, adapter_id, fine_tuned_model)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (fresh_id, tenant, now, VALIDATING, new.model, new.training_file, new.validation_file, new.seed,
                 new.suffix, dump(new.metadata), dump(new.method), dump(new.hyperparameters), dump(new.adapter),
                 dump(new.training), dump(new.spec), new.adapter_id, new.fine_tuned_model),
            )  # fmt: skip
            if submission is not None:
                insert_submission(connection, tenant, submission, fresh_id, now)
            insert_events(connection, tenant, fresh_id, events, now)
            return _present(find_job(connection, tenant, fresh_id), fresh_id), True

        return await self._database.write(insert)

    async def submitted(self, tenant: str, submission: Submission) -> Job | None:
        """The job that an equal submission made. Raises IdempotencyConflict for its key with another body."""
        now = int(self._clock())

        def find(connection: sqlite3.Connection) -> Job | None:
            job_id = find_submission(connection, tenant, submission, now)
            return None if job_id is None else find_job(connection, tenant, job_id)

        return await self._database.read(find)

    async def get(self, tenant: str, job_id: str) -> Job | None:
        return await self._database.read(lambda connection: find_job(connection, tenant, job_id))

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """Newest first; `metadata` keeps jobs that carry all these pairs. Raises UnknownCursor."""
        pairs = list((metadata or {}).items())
        has_pair = "EXISTS (SELECT 1 FROM json_each(jobs.metadata) WHERE json_each.key = ? AND json_each.value = ?)"
        where = " AND ".join(["tenant = ?"] + [has_pair] * len(pairs))
        values = [tenant, *(part for pair in pairs for part in pair)]
        return await self._database.read(
            lambda connection: page(connection, "jobs", job_of, where=where, values=values, after=after, limit=limit)
        )

    async def change(self, tenant: str, job_id: str, change: JobChange) -> Job | None:
        """Set fields, status and events in one commit. Raises InvalidTransition; None for an unknown job.

        A job that is already where `change.status` puts it stays untouched, so that a repeated cancel adds no event.
        """
        now = int(self._clock())

        def update(connection: sqlite3.Connection) -> Job | None:
            job = find_job(connection, tenant, job_id)
            if job is None or (change.status is not None and change.status == job.status):
                return job
            return apply_change(connection, job, change, now)

        return await self._database.write(update)

    async def count(self, tenant: str, statuses: Sequence[str]) -> int:
        """How many of the tenant's jobs are in one of `statuses`."""
        marks = ", ".join("?" * len(statuses))

        def find(connection: sqlite3.Connection) -> int:
            return connection.execute(
                f"SELECT COUNT(*) FROM jobs WHERE tenant = ? AND status IN ({marks})", [tenant, *statuses]
            ).fetchone()[0]

        return await self._database.read(find)

    async def all_with_status_for_recovery(self, statuses: Sequence[str]) -> tuple[Job, ...]:
        """Jobs of all tenants in one of `statuses`, oldest first: also the order of the queue."""
        marks = ", ".join("?" * len(statuses))

        def find(connection: sqlite3.Connection) -> tuple[Job, ...]:
            rows = connection.execute(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY seq", list(statuses))
            return tuple(job_of(row) for row in rows)

        return await self._database.read(find)

    async def find_for_recovery(self, job_id: str) -> Job | None:
        """A job by id alone, for what the engine says of it; never for a tenant's request."""

        def find(connection: sqlite3.Connection) -> Job | None:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return job_of(row) if row else None

        return await self._database.read(find)


def find_job(connection: sqlite3.Connection, tenant: str, job_id: str) -> Job | None:
    row = connection.execute("SELECT * FROM jobs WHERE tenant = ? AND id = ?", (tenant, job_id)).fetchone()
    return job_of(row) if row else None


def apply_change(connection: sqlite3.Connection, job: Job, change: JobChange, now: int) -> Job:
    """Write `change` inside the caller's transaction; `now` (Unix seconds) dates events and the end of the job."""
    columns: dict[str, Any] = {}
    if change.requested is not None and job.status in FINAL:
        raise InvalidTransition(job.id, job.status, _REQUEST_MEANS[change.requested])
    if change.requested is not None and job.requested != "cancel":  # a pause does not undo a cancel
        columns["requested"] = change.requested
    if change.status is not None and change.status != job.status:
        check_transition(job.id, job.status, change.status)
        columns["status"] = change.status
        if change.status in FINAL:
            columns |= {"finished_at": now, "requested": None}
    for name in ("adapter_id", "fine_tuned_model", "trained_tokens", "estimated_finish", "crashes"):
        value = getattr(change, name)
        if value is not None:
            columns[name] = value
    for name in ("method", "hyperparameters", "spec", "error", "progress"):
        value = getattr(change, name)
        if value is not None:
            columns[name] = dump(value)
    if change.result_files is not None:
        columns["result_files"] = dump(list(change.result_files))
    if change.clear_requested:
        columns["requested"] = None
    if columns:
        names = ", ".join(f"{name} = ?" for name in columns)
        connection.execute(
            f"UPDATE jobs SET {names} WHERE tenant = ? AND id = ?", [*columns.values(), job.tenant, job.id]
        )
    insert_events(connection, job.tenant, job.id, change.events, now)
    return _present(find_job(connection, job.tenant, job.id), job.id)


def job_of(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in row.keys() if name != "seq"}  # noqa: SIM118 - a Row iterates over values
    for name in ("metadata", "method", "hyperparameters", "adapter", "training", "spec", "error", "progress"):
        values[name] = load(values[name])
    values["result_files"] = tuple(load(values["result_files"]))
    return Job(**values)


def _present(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise LookupError(f"job {job_id} vanished inside its own transaction")
    return job
