"""Moves finetuning jobs along: validation, queue, engine, end. Every change of a job's status is ordered by its lock.

The engine's event files are the truth about running jobs; pushed events are the news of them. Everything here may
be interrupted at any point and goes on from the database and those files.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from typing import Any

from coserve.server.gateway import job_changes
from coserve.server.gateway.engine_client import EngineClient, EngineUnavailable
from coserve.server.gateway.file_service import FileService
from coserve.server.gateway.job_events import STORAGE_FULL, Translation
from coserve.server.gateway.job_history import JobHistory
from coserve.server.gateway.job_preparation import Preparer
from coserve.server.gateway.job_room import MARGIN_BYTES, RoomWait
from coserve.server.gateway.job_signals import JobSignals
from coserve.server.gateway.job_slots import JobSlots
from coserve.server.gateway.job_validation import JobValidation
from coserve.server.gateway.tenant_weights import TenantWeights
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.errors import InvalidTransition
from coserve.server.store.jobs import Job, JobChange
from coserve.server.store.store import Store
from coserve.server.store.transitions import FINAL, PAUSED, QUEUED, RUNNING, VALIDATING
from coserve.server.tenancy.terms import Terms
from coserve.server.wire.messages import Drained, EngineReady, JobEvent, StartJob, StopJob

log = logging.getLogger("coserve.jobs")

TICK_SECONDS = 5.0
SOME_ROOM = 1024**2  # bytes that became free: a job may have been unable to say that it paused


class JobController:
    """`start` once the store is open; commands may be called from any task of the loop."""

    def __init__(
        self, store: Store, data: DataDirectory, engine: EngineClient, files: FileService, preparer: Preparer, *,
        slots: JobSlots, terms: Terms, tick_seconds: float = TICK_SECONDS,
    ) -> None:  # fmt: skip
        self.signals = JobSignals()
        self._store = store
        self._data = data
        self._engine = engine
        self._preparer = preparer
        self._history = JobHistory(store, data, files)
        self._lock = asyncio.Lock()
        self._validation = JobValidation(store, engine, preparer, self._lock, self._changed)
        self._slots = slots
        self.weights = TenantWeights(store, terms)
        self._terms = terms
        self._tick_seconds = tick_seconds
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._active: dict[str, int] = {}  # jobs that the connected engine has -> their crashes
        self._pid: int | None = None  # of the latest engine, unless it went away on purpose
        self._stuck: set[str] = set()  # jobs whose next event could not be applied
        self._worker: asyncio.Task[None] | None = None
        self._draining = False
        self._free_bytes = 0  # of the disk, at the latest tick
        self._room = RoomWait()

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Take up every job where an earlier process left it; returns before the engine is there."""
        for kind in (EngineReady, JobEvent, Drained):
            self._engine.subscribe(kind, self._inbox.put_nowait)
        if self._engine.engine is not None:
            self._inbox.put_nowait(self._engine.engine)
        for job in await self._store.jobs.all_with_status_for_recovery((VALIDATING,)):
            self._validation.begin(job)
        self._worker = asyncio.create_task(self._work(), name="job-controller")

    async def close(self) -> None:
        """Stop deciding. Jobs that run go on in the engine."""
        await self._validation.close()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    def drain(self) -> None:
        """Start no more jobs: the server is shutting down."""
        self._draining = True

    # ------------------------------------------------------------------ commands of tenants

    def prepare(self, job: Job) -> None:
        """Validate and tokenize a new job's files; it becomes queued or failed."""
        self._validation.begin(job)

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """End a job; the engine frees what it holds at its next unit. Raises InvalidTransition; None if unknown."""
        async with self._lock:
            job = await self._store.jobs.get(tenant, job_id)
            if job is None:
                return None
            job = await self._store.jobs.change(tenant, job_id, job_changes.cancelled(job))
            self._validation.stop(job_id)
            if job_id in self._active:
                await self._tell(StopJob(job_id, pause=False))
            elif job_id not in self._validation:
                await asyncio.to_thread(self._preparer.discard, job_id)
            self._changed(job_id)
            return job

    async def pause(self, tenant: str, job_id: str, patience_seconds: float) -> Job | None:
        """Stop a job so that it can go on; waits for the engine's checkpoint. Raises InvalidTransition.

        If the engine takes longer than `patience_seconds`, the job is returned with the pause still requested.
        """
        async with self._lock:
            job = await self._store.jobs.get(tenant, job_id)
            if job is None or job.status == PAUSED:
                return job
            if job.status in FINAL:
                raise InvalidTransition(job_id, job.status, PAUSED)
            if job.status == VALIDATING:
                return await self._store.jobs.change(tenant, job_id, JobChange(requested="pause"))
            if job_id not in self._active and (job.status == QUEUED or self._engine.engine is not None):
                return await self._change(job, job_changes.paused())
            await self._store.jobs.change(tenant, job_id, JobChange(requested="pause"))
            await self._tell(StopJob(job_id, pause=True))
        return await self._until_paused(tenant, job_id, patience_seconds)

    async def resume(self, tenant: str, job_id: str) -> Job | None:
        """Queue a paused job again. Raises InvalidTransition for one that is not paused."""
        async with self._lock:
            job = await self._store.jobs.get(tenant, job_id)
            if job is None:
                return None
            if job.status == PAUSED:
                return await self._change(job, job_changes.queued_again(job, "Fine-tuning job resumed"))
            if job.requested != "pause":
                raise InvalidTransition(job_id, job.status, QUEUED)
            return await self._change(job, JobChange(clear_requested=True))  # if it still pauses, it is started again

    async def _until_paused(self, tenant: str, job_id: str, seconds: float) -> Job | None:
        deadline = time.monotonic() + seconds
        while True:
            ticket = self.signals.ticket(job_id)
            job = await self._store.jobs.get(tenant, job_id)
            left = deadline - time.monotonic()
            if job is None or job.status in FINAL | {PAUSED} or job.requested != "pause" or left <= 0:
                self.signals.give_back(job_id, ticket)
                return job
            await self.signals.wait(job_id, ticket, left)

    async def _change(self, job: Job, change: JobChange) -> Job | None:
        changed = await self._store.jobs.change(job.tenant, job.id, change)
        self._changed(job.id)
        return changed

    def _changed(self, job_id: str) -> None:
        """Wake who waits for the job, and look at the queue again."""
        self.signals.notify(job_id)
        self._inbox.put_nowait("queue")

    # ------------------------------------------------------------------ news of the engine

    async def _work(self) -> None:
        ticked = time.monotonic()
        while True:
            message: Any = "tick"
            left = ticked + self._tick_seconds - time.monotonic()
            if left > 0:
                try:
                    async with asyncio.timeout(left):
                        message = await self._inbox.get()
                except TimeoutError:
                    continue
            else:
                ticked = time.monotonic()
            try:
                async with self._lock:
                    await self._handle(message)
            except Exception:
                log.exception("%s could not be handled; it is tried again", type(message).__name__)
                if isinstance(message, EngineReady):
                    await asyncio.sleep(self._tick_seconds)
                    if self._engine.engine is not None:
                        self._inbox.put_nowait(self._engine.engine)

    async def _handle(self, message: Any) -> None:
        match message:
            case EngineReady():
                await self._reconcile(message)
            case Drained():
                self._pid = None
                return
            case JobEvent():
                if not await self._take(message):
                    return
            case "tick":
                await self._tick()
        await self._dispatch()

    async def _take(self, event: JobEvent) -> bool:
        """Apply a pushed event, or what its file has by now; True if the queue may move on because of it."""
        if event.job_id in self._stuck:
            return False  # its file is read at the next tick
        job = await self._store.jobs.find_for_recovery(event.job_id)
        if job is None or event.seq <= job.last_seq:
            return False
        if event.seq > job.last_seq + 1:
            await self._catch_up(job)
            return True
        try:
            return await self._applied(*await self._history.apply(job, event.record))
        except Exception:
            self._stuck.add(event.job_id)
            raise

    async def _catch_up(self, job: Job) -> Job:
        """Apply what the job's file has; what cannot be applied now (a full disk) is tried again at the next tick."""
        reached = job
        try:
            async for reached, translation in self._history.catch_up(job):
                await self._applied(reached, translation)
        except Exception:
            log.exception("the events of job %s could not be applied; they will be read again", job.id)
            self._stuck.add(job.id)
        return reached

    async def _applied(self, job: Job, translation: Translation) -> bool:
        if translation.change.status == PAUSED and job.progress.get("reason") == STORAGE_FULL:
            self._room.paused(job.id, time.monotonic())
        elif translation.checkpoint is not None or job.status in FINAL:
            self._room.wrote(job.id)
        forgiven = translation.change.crashes == 0
        if forgiven and job.id in self._active:
            self._active[job.id] = 0
        if translation.released:
            self._active.pop(job.id, None)
            if self._slots.free(job.id) and job.status == RUNNING:
                await self._store.jobs.change(job.tenant, job.id, job_changes.gave_way(job))
            if job.status in FINAL:
                await asyncio.to_thread(self._preparer.discard, job.id)
        self.signals.notify(job.id)
        return forgiven or translation.released

    async def _reconcile(self, engine: EngineReady) -> None:
        """A connection to an engine: learn what happened meanwhile, stop what should not run, count crashes."""
        crashed = frozenset(self._active) if self._pid not in (None, engine.pid) else frozenset()
        self._pid = engine.pid
        self._active = dict.fromkeys(engine.running_jobs, 0)
        self._slots.clear()
        for job in await self._store.jobs.all_with_status_for_recovery((QUEUED, RUNNING)):
            job = await self._catch_up(job)
            if job.status not in (QUEUED, RUNNING):
                continue
            if job.id in self._active:
                self._active[job.id] = job.crashes
                self._slots.taken(job, time.monotonic())
                if job.requested == "pause":
                    await self._tell(StopJob(job.id, pause=True))
            elif job.requested == "pause":
                await self._change(job, job_changes.paused())
            elif job.id in crashed:
                await self._change(job, job_changes.crashed(job))
        for job_id in engine.running_jobs:
            found = await self._store.jobs.find_for_recovery(job_id)
            if found is None or found.status in FINAL | {PAUSED}:
                await self._tell(StopJob(job_id, pause=found is not None and found.status == PAUSED))
                if found is not None:  # the engine may have let go of it just now
                    await self._catch_up(found)

    async def _dispatch(self) -> None:
        """Hand waiting jobs to the engine while there are slots; where there are none, one may be given back."""
        if self._engine.engine is None or self._engine.engine.pid != self._pid or self._draining:
            return
        jobs = await self._store.jobs.all_with_status_for_recovery((QUEUED, RUNNING))
        weights, now = await self.weights.of(job.tenant for job in jobs), time.monotonic()
        report = self._engine.stats
        idle = frozenset(one.job_id for one in (report.jobs if report is not None else ()) if one.waits is not None)
        moves = self._slots.moves(jobs, self._active, weights, idle, now)
        for job in (job for job in jobs if job.id in moves.start):
            if await self._tell(await self._start(job)):
                self._active[job.id] = job.crashes
                self._slots.taken(job, now)
        if moves.yielding is not None:
            await self._tell(StopJob(moves.yielding, pause=True))

    async def _start(self, job: Job) -> StartJob:
        tenant = await self._store.tenants.get(job.tenant)
        return StartJob(job.id, job.tenant, self._terms.share(tenant.name if tenant is not None else job.tenant))

    async def _tell(self, message: Any) -> bool:
        """False if the engine is away; the next reconciliation says it again."""
        try:
            await self._engine.send(message)
        except EngineUnavailable:
            return False
        return True

    # ------------------------------------------------------------------ from time to time

    async def _tick(self) -> None:
        for job_id in list(self._stuck):
            self._stuck.discard(job_id)
            job = await self._store.jobs.find_for_recovery(job_id)
            if job is not None:
                await self._catch_up(job)
        before, self._free_bytes = self._free_bytes, shutil.disk_usage(self._data.root).free
        if before < MARGIN_BYTES and self._free_bytes >= before + SOME_ROOM:
            # A full disk may have kept the engine from saying that it paused: running jobs ignore this.
            for job in await self._store.jobs.all_with_status_for_recovery((RUNNING,)):
                if job.id in self._active and job.requested is None:
                    await self._tell(await self._start(job))
        for job in await self._store.jobs.all_with_status_for_recovery((PAUSED,)):
            needed, full = job.progress.get("room_needed") or 0, job.progress.get("reason") == STORAGE_FULL
            if full and self._room.may_go_on(job.id, needed, self._free_bytes, time.monotonic()):
                await self._change(
                    job, job_changes.queued_again(job, "There is room on the disk again; the job goes on")
                )
