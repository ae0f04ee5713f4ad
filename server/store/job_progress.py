"""What the engine reports of a job, applied to the database one event at a time, each exactly once.

The engine's event file numbers its lines 1, 2, …; the job row remembers the last one applied. Everything that an
event brings about is one commit with that number, so a crash in between repeats or loses nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coserve.server.store.adapters import AdapterVersion, NewVersion, ensure_adapter, insert_version
from coserve.server.store.checkpoints import NewCheckpoint, insert_checkpoint, prune_checkpoint
from coserve.server.store.database import Database
from coserve.server.store.errors import EventGap
from coserve.server.store.files import NewFile, insert_file
from coserve.server.store.ids import ADAPTER, FILE, new_id
from coserve.server.store.jobs import Job, JobChange, apply_change, find_job


@dataclass(frozen=True, slots=True)
class JobEffects:
    """What one engine event brings about. The files that it names are on disk already."""

    change: JobChange = field(default_factory=JobChange)
    checkpoint: NewCheckpoint | None = None
    pruned_step: int | None = None
    version: NewVersion | None = (
        None  # a new version of the job's adapter, which is made, or made again, if it is not there
    )
    adapter_name: str | None = None  # its name when made; its id is the job's `adapter_id`
    result_file: NewFile | None = None
    result_file_id: str | None = None  # the id under which the bytes were stored


@dataclass(frozen=True, slots=True)
class Applied:
    job: Job
    fresh: bool  # False: this event had been applied before, nothing was done
    version: AdapterVersion | None = None


class JobProgress:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def apply(self, tenant: str, job_id: str, seq: int, effects: JobEffects) -> Applied | None:
        """Apply engine event number `seq`; None for an unknown job.

        Raises EventGap if `seq` is not the next one, InvalidTransition if the job's status forbids the change; then
        nothing of the event is kept. An event without effects still has to be applied, as `JobEffects()`.
        """
        now = int(self._clock())

        def update(connection: sqlite3.Connection) -> Applied | None:
            job = find_job(connection, tenant, job_id)
            if job is None:
                return None
            if seq <= job.last_seq:
                return Applied(job, fresh=False)
            if seq != job.last_seq + 1:
                raise EventGap(job_id, job.last_seq + 1, seq)
            change, version = effects.change, None
            if effects.checkpoint is not None:
                insert_checkpoint(connection, tenant, job_id, effects.checkpoint, now)
            if effects.pruned_step is not None:
                prune_checkpoint(connection, tenant, job_id, effects.pruned_step)
            if effects.version is not None:
                adapter_id = job.adapter_id or new_id(ADAPTER)
                name = effects.adapter_name or job.fine_tuned_model or adapter_id
                ensure_adapter(connection, tenant, adapter_id, name, job.fine_tuned_model, now)
                version = insert_version(connection, tenant, adapter_id, effects.version, now)
                change = replace(change, adapter_id=adapter_id)
            if effects.result_file is not None:
                file_id = effects.result_file_id or new_id(FILE)
                insert_file(connection, tenant, file_id, effects.result_file, now)
                change = replace(change, result_files=[*job.result_files, file_id])
            connection.execute("UPDATE jobs SET last_seq = ? WHERE tenant = ? AND id = ?", (seq, tenant, job_id))
            return Applied(apply_change(connection, job, change, now), fresh=True, version=version)

        return await self._database.write(update)
