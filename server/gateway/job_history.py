"""Brings a job's rows up to what its event file says, one event a commit, each exactly once.

The files that an event's rows will name are put in place before the commit: what a tenant can see can be used.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from coserve.server.gateway.adapter_folders import copy_version
from coserve.server.gateway.file_service import FileService
from coserve.server.gateway.job_events import Pace, Translation, translate
from coserve.server.gateway.job_log import read_after
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.job_progress import JobEffects
from coserve.server.store.jobs import Job, JobChange
from coserve.server.store.store import Store
from coserve.server.store.transitions import RUNNING, SUCCEEDED


class JobHistory:
    def __init__(self, store: Store, data: DataDirectory, files: FileService) -> None:
        self._store = store
        self._data = data
        self._files = files
        self._paces: dict[str, Pace] = {}

    async def catch_up(self, job: Job) -> AsyncIterator[tuple[Job, Translation]]:
        """Apply everything that the file has beyond what was applied; the job after each event, and what it was."""
        path = self._data.job(job.id) / "events.jsonl"
        for record in await asyncio.to_thread(read_after, path, job.last_seq):
            job, translation = await self.apply(job, record)
            yield job, translation

    async def apply(self, job: Job, record: dict[str, Any]) -> tuple[Job, Translation]:
        """Apply the next event, all of it or nothing. Raises EventGap for another one, StoreUnavailable, OSError."""
        translation = translate(job, record, self._paces.setdefault(job.id, Pace()))
        effects = await self._on_disk(job, translation)
        try:
            if translation.change.status == SUCCEEDED and job.status != RUNNING:  # it ran on before a pause reached it
                await self._store.jobs.change(job.tenant, job.id, JobChange(status=RUNNING))
            applied = await self._store.progress.apply(job.tenant, job.id, record["seq"], effects)
        except Exception:
            if effects.result_file_id is not None:
                await asyncio.to_thread(self._files.discard, job.tenant, effects.result_file_id)
            raise
        if translation.released:
            self._paces.pop(job.id, None)
        return (job if applied is None else applied.job), translation

    async def _on_disk(self, job: Job, translation: Translation) -> JobEffects:
        effects = JobEffects(
            change=translation.change, checkpoint=translation.checkpoint, pruned_step=translation.pruned_step
        )
        published = translation.published
        if published is not None and job.adapter_id is not None:
            version = await asyncio.to_thread(
                copy_version, self._data, published.path, job.tenant, job.adapter_id, published.digest
            )
            version = replace(version, job_id=job.id, step=published.step)
            effects = replace(effects, version=version, adapter_name=job.id)
        if translation.result_path is not None:
            source = self._data.resolve(translation.result_path)
            file_id, new = await asyncio.to_thread(
                self._files.copy_in, job.tenant, source, "step_metrics.csv", "fine-tune-results"
            )
            effects = replace(effects, result_file=new, result_file_id=file_id)
        return effects
