"""Carries jobs from `validating_files` to queued or failed, beside everything else; each can be stopped.

A validation that is cut off by the end of the process begins again at the next start.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable

from coserve.server.data.dataset import Stopped
from coserve.server.gateway import job_changes
from coserve.server.gateway.engine_client import EngineClient, EngineUnavailable
from coserve.server.gateway.job_events import STORAGE_FULL
from coserve.server.gateway.job_preparation import PreparationFailed, Preparer
from coserve.server.store.errors import StoreUnavailable
from coserve.server.store.jobs import Job, JobChange
from coserve.server.store.store import Store
from coserve.server.store.transitions import FAILED, QUEUED, VALIDATING

log = logging.getLogger("coserve.jobs")

RETRY_SECONDS = 5.0


class JobValidation:
    """`lock` orders changes of jobs with all others; `left` is called with the id of each job that leaves."""

    def __init__(
        self, store: Store, engine: EngineClient, preparer: Preparer, lock: asyncio.Lock, left: Callable[[str], None]
    ) -> None:
        self._store = store
        self._engine = engine
        self._preparer = preparer
        self._lock = lock
        self._left = left
        self._running: dict[str, tuple[asyncio.Task[None], threading.Event]] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._running

    def begin(self, job: Job) -> None:
        stopped = threading.Event()
        task = asyncio.create_task(self._validate(job, stopped), name=f"validate-{job.id}")
        self._running[job.id] = (task, stopped)
        task.add_done_callback(lambda _: self._running.pop(job.id, None))

    def stop(self, job_id: str) -> None:
        """A cancelled job needs no more of it. Idempotent."""
        if job_id in self._running:
            self._running[job_id][1].set()

    async def close(self) -> None:
        tasks = [task for task, _ in self._running.values()]
        for task, stopped in list(self._running.values()):
            stopped.set()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _validate(self, job: Job, stopped: threading.Event) -> None:
        change = await self._outcome(job, stopped)
        while True:
            try:
                await self._leave(job, change)
                break
            except StoreUnavailable:
                log.exception("job %s waits for the database", job.id)
                await asyncio.sleep(RETRY_SECONDS)
        self._left(job.id)

    async def _outcome(self, job: Job, stopped: threading.Event) -> JobChange:
        try:
            while (engine := self._engine.known) is None:  # the spec names the base model; the engine knows it
                await self._wait_for_engine(job)
            prepared = await self._preparer.prepare(job, engine, stopped)
            return job_changes.validated(job, prepared.spec, prepared.total_steps, prepared.warnings)
        except Stopped:
            return JobChange()  # cancelled: the job has its final status already
        except PreparationFailed as error:
            return job_changes.failed(error.code, error.message, error.param)
        except Exception as error:
            log.exception("job %s could not be prepared", job.id)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = "The server's disk is full; create the job again when there is room."
                return job_changes.failed(STORAGE_FULL, message)
            return job_changes.failed(
                "internal_error", "The server had an error while it prepared the job; create it again."
            )

    async def _wait_for_engine(self, job: Job) -> None:
        try:
            await self._engine.wait_ready(60.0)
        except EngineUnavailable:
            log.debug("job %s waits for the engine", job.id)

    async def _leave(self, job: Job, change: JobChange) -> None:
        async with self._lock:
            current = await self._store.jobs.get(job.tenant, job.id)
            if current is None or current.status != VALIDATING:
                await asyncio.to_thread(self._preparer.discard, job.id)
                return
            if change.status == FAILED:
                await asyncio.to_thread(self._preparer.discard, job.id)
            changed = await self._store.jobs.change(job.tenant, job.id, change)
            if changed is not None and changed.status == QUEUED and changed.requested == "pause":
                await self._store.jobs.change(job.tenant, job.id, job_changes.paused())
