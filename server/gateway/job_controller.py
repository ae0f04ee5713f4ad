"""Moves finetuning jobs along: preparation, queue, engine, end. The only place that changes a job's status.

The engine's event files are the truth about running jobs; pushed events are the news of them. Everything here may
be interrupted at any point and goes on from the database and those files. One lock orders all decisions.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
import threading
from dataclasses import replace
from typing import Any

from coserve.server.data.dataset import Stopped
from coserve.server.gateway.adapter_folders import copy_version
from coserve.server.gateway.engine_client import EngineClient, EngineUnavailable
from coserve.server.gateway.file_service import FileService
from coserve.server.gateway.job_events import STORAGE_FULL, Pace, Translation, translate
from coserve.server.gateway.job_log import read_after
from coserve.server.gateway.job_preparation import PreparationFailed, Preparer
from coserve.server.gateway.job_queue import CRASHES_ALLOWED, Waiting, to_start
from coserve.server.gateway.job_signals import JobSignals
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.errors import EventGap, InvalidTransition, StoreUnavailable
from coserve.server.store.job_events import NewEvent
from coserve.server.store.job_progress import JobEffects
from coserve.server.store.jobs import Job, JobChange
from coserve.server.store.store import Store
from coserve.server.store.transitions import (
    CANCELLED,
    FAILED,
    FINAL,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    VALIDATING,
)
from coserve.server.wire.messages import Drained, EngineReady, JobEvent, StartJob, StopJob

log = logging.getLogger("coserve.jobs")

TICK_SECONDS = 5.0
PLENTY_OF_ROOM = 256 * 1024**2  # free bytes of the disk with which any paused job may try again
SOME_ROOM = 1024**2  # bytes that became free: worth a try too


class JobController:
    """`start` once the store is open; commands may be called from any task of the loop."""

    def __init__(
        self,
        store: Store,
        data: DataDirectory,
        engine: EngineClient,
        files: FileService,
        preparer: Preparer,
        *,
        most_running: int,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self.signals = JobSignals()
        self._store = store
        self._data = data
        self._engine = engine
        self._files = files
        self._preparer = preparer
        self._most_running = most_running
        self._tick_seconds = tick_seconds
        self._lock = asyncio.Lock()
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._active: dict[str, int] = {}  # jobs that the connected engine has -> their crashes
        self._pid: int | None = None  # of the latest engine, unless it went away on purpose
        self._paces: dict[str, Pace] = {}
        self._stuck: set[str] = set()  # jobs whose next event could not be applied
        self._preparing: dict[str, tuple[asyncio.Task[None], threading.Event]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._draining = False
        self._free_bytes = 0  # of the disk, at the latest tick

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Take up every job where an earlier process left it; returns before the engine is there."""
        for kind in (EngineReady, JobEvent, Drained):
            self._engine.subscribe(kind, self._inbox.put_nowait)
        if self._engine.engine is not None:
            self._inbox.put_nowait(self._engine.engine)
        for job in await self._store.jobs.all_with_status_for_recovery((VALIDATING,)):
            self.prepare(job)
        self._worker = asyncio.create_task(self._work(), name="job-controller")

    async def close(self) -> None:
        """Stop deciding. Jobs that run go on in the engine."""
        tasks = [task for task, _ in self._preparing.values()]
        for _, cancelled in self._preparing.values():
            cancelled.set()
        if self._worker is not None:
            tasks.append(self._worker)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._worker = None

    def drain(self) -> None:
        """Start no more jobs: the server is shutting down."""
        self._draining = True

    # ------------------------------------------------------------------ commands of tenants

    def prepare(self, job: Job) -> None:
        """Validate and tokenize a job's files beside everything else; it becomes queued or failed."""
        cancelled = threading.Event()
        task = asyncio.create_task(self._prepare(job, cancelled), name=f"prepare-{job.id}")
        self._preparing[job.id] = (task, cancelled)
        task.add_done_callback(lambda _: self._preparing.pop(job.id, None))

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """End a job; the engine frees what it holds at its next unit. Raises InvalidTransition; None if unknown."""
        async with self._lock:
            progress = await self._progress(tenant, job_id, eta_seconds=None, reason=None)
            job = await self._store.jobs.change(
                tenant, job_id,
                JobChange(status=CANCELLED, progress=progress, events=[NewEvent("Fine-tuning job cancelled")]),
            )  # fmt: skip
            if job is None:
                return None
            if job_id in self._preparing:
                self._preparing[job_id][1].set()
            if job_id in self._active:
                await self._tell(StopJob(job_id, pause=False))
            elif job_id not in self._preparing:
                await asyncio.to_thread(self._preparer.discard, job_id)
            self.signals.notify(job_id)
            self._inbox.put_nowait(None)
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
                return await self._set_paused(job)
            job = await self._store.jobs.change(tenant, job_id, JobChange(requested="pause"))
            await self._tell(StopJob(job_id, pause=True))
        return await self._until_released(tenant, job_id, patience_seconds)

    async def resume(self, tenant: str, job_id: str) -> Job | None:
        """Queue a paused job again. Raises InvalidTransition for one that is not paused."""
        async with self._lock:
            job = await self._store.jobs.get(tenant, job_id)
            if job is None:
                return None
            if job.status == PAUSED:
                change = JobChange(
                    status=QUEUED, clear_requested=True, progress={**job.progress, "reason": None},
                    events=[NewEvent("Fine-tuning job resumed")],
                )  # fmt: skip
            elif job.requested == "pause":
                change = JobChange(clear_requested=True)  # should the engine still pause it, it is started again
            else:
                raise InvalidTransition(job_id, job.status, QUEUED)
            job = await self._store.jobs.change(tenant, job_id, change)
            self._inbox.put_nowait(None)
            self.signals.notify(job_id)
            return job

    async def _until_released(self, tenant: str, job_id: str, seconds: float) -> Job | None:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            ticket = self.signals.ticket(job_id)
            job = await self._store.jobs.get(tenant, job_id)
            left = deadline - asyncio.get_running_loop().time()
            if job is None or job.status in FINAL | {PAUSED} or job.requested != "pause" or left <= 0:
                self.signals.give_back(job_id, ticket)
                return job
            await self.signals.wait(job_id, ticket, left)

    async def _progress(self, tenant: str, job_id: str, **fields: Any) -> dict[str, Any]:
        job = await self._store.jobs.get(tenant, job_id)
        return {**(job.progress if job else {}), **fields}

    async def _set_paused(self, job: Job) -> Job | None:
        change = JobChange(status=PAUSED, clear_requested=True, events=[NewEvent("Fine-tuning job paused")])
        changed = await self._store.jobs.change(job.tenant, job.id, change)
        self.signals.notify(job.id)
        return changed

    # ------------------------------------------------------------------ preparation

    async def _prepare(self, job: Job, cancelled: threading.Event) -> None:
        try:
            change = await self._prepared(job, cancelled)
        except Stopped:
            change = JobChange()  # cancelled: the job has its final status already
        except PreparationFailed as error:
            change = JobChange(
                status=FAILED, error={"code": error.code, "message": error.message, "param": error.param},
                events=[NewEvent(error.message, level="error")],
            )  # fmt: skip
        except Exception as error:
            log.exception("job %s could not be prepared", job.id)
            code, message = "internal_error", "The server had an error while it prepared the job; create it again."
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                code, message = STORAGE_FULL, "The server's disk is full; create the job again when there is room."
            change = JobChange(
                status=FAILED, error={"code": code, "message": message, "param": None},
                events=[NewEvent(message, level="error")],
            )  # fmt: skip
        while True:
            try:
                await self._leave_preparation(job, change)
                return
            except StoreUnavailable:
                log.exception("job %s waits for the database", job.id)
                await asyncio.sleep(self._tick_seconds)

    async def _leave_preparation(self, job: Job, change: JobChange) -> None:
        async with self._lock:
            current = await self._store.jobs.get(job.tenant, job.id)
            if current is None or current.status != VALIDATING:
                await asyncio.to_thread(self._preparer.discard, job.id)
                return
            if change.status == FAILED:
                await asyncio.to_thread(self._preparer.discard, job.id)
            changed = await self._store.jobs.change(job.tenant, job.id, change)
            if changed is not None and changed.status == QUEUED and changed.requested == "pause":
                await self._set_paused(changed)
        self.signals.notify(job.id)
        self._inbox.put_nowait(None)

    async def _prepared(self, job: Job, cancelled: threading.Event) -> JobChange:
        while (engine := self._engine.known) is None:  # the spec names the base model; the engine knows it
            try:
                await self._engine.wait_ready(60.0)
            except EngineUnavailable:
                log.debug("job %s waits for the engine", job.id)
        prepared = await self._preparer.prepare(job, engine, cancelled)
        events = [NewEvent(warning, level="warn") for warning in prepared.warnings]
        return JobChange(
            status=QUEUED, spec=prepared.spec, progress={"step": 0, "total_steps": prepared.total_steps},
            events=[*events, NewEvent("Files validated, moving job to queued state")],
        )  # fmt: skip

    # ------------------------------------------------------------------ the engine

    async def _work(self) -> None:
        while True:
            message = await self._next_message()
            try:
                async with self._lock:
                    await self._handle(message)
            except Exception:
                log.exception("a job event could not be handled; its file will be read again")
                if isinstance(message, JobEvent):
                    self._stuck.add(message.job_id)
                elif isinstance(message, EngineReady):
                    await asyncio.sleep(self._tick_seconds)
                    if self._engine.engine is not None:
                        self._inbox.put_nowait(self._engine.engine)

    async def _next_message(self) -> Any:
        try:
            async with asyncio.timeout(self._tick_seconds):
                return await self._inbox.get()
        except TimeoutError:
            return "tick"

    async def _handle(self, message: Any) -> None:
        match message:
            case EngineReady():
                await self._reconcile(message)
            case Drained():
                self._pid = None
                return
            case JobEvent():
                job = await self._store.jobs.find_for_recovery(message.job_id)
                if job is None or message.seq <= job.last_seq:
                    return
                if message.seq > job.last_seq + 1:
                    await self._try_to_catch_up(job)
                elif not await self._apply(job, message.record):
                    return
            case "tick":
                await self._tick()
        await self._dispatch()

    async def _tick(self) -> None:
        for job_id in list(self._stuck):
            self._stuck.discard(job_id)
            job = await self._store.jobs.find_for_recovery(job_id)
            if job is not None:
                await self._try_to_catch_up(job)
        before, self._free_bytes = self._free_bytes, shutil.disk_usage(self._data.root).free
        freed = before < PLENTY_OF_ROOM and self._free_bytes >= before + SOME_ROOM
        if freed:
            # A full disk may have kept the engine from saying that it paused: running jobs ignore this.
            await self._start_again()
        for job in await self._store.jobs.all_with_status_for_recovery((PAUSED,)):
            if job.progress.get("reason") == STORAGE_FULL and (freed or self._free_bytes >= PLENTY_OF_ROOM):
                change = JobChange(
                    status=QUEUED, progress={**job.progress, "reason": None},
                    events=[NewEvent("There is room on the disk again; the job goes on")],
                )  # fmt: skip
                await self._store.jobs.change(job.tenant, job.id, change)
                self.signals.notify(job.id)

    async def _start_again(self) -> None:
        for job_id in self._active:
            job = await self._store.jobs.find_for_recovery(job_id)
            if job is not None and job.status == RUNNING and job.requested is None:
                await self._tell(StartJob(job_id, job.tenant))

    async def _reconcile(self, engine: EngineReady) -> None:
        """A connection to an engine: learn what happened meanwhile, stop what should not run, count crashes."""
        crashed = frozenset(self._active) if self._pid not in (None, engine.pid) else frozenset()
        self._pid = engine.pid
        self._active = dict.fromkeys(engine.running_jobs, 0)
        for job in await self._store.jobs.all_with_status_for_recovery((QUEUED, RUNNING)):
            job = await self._try_to_catch_up(job)
            if job.status not in (QUEUED, RUNNING):
                continue
            if job.id in self._active:
                self._active[job.id] = job.crashes
                if job.requested == "pause":
                    await self._tell(StopJob(job.id, pause=True))
            elif job.requested == "pause":
                await self._set_paused(job)
            elif job.id in crashed:
                await self._count_crash(job)
        for job_id in engine.running_jobs:
            found = await self._store.jobs.find_for_recovery(job_id)
            if found is None or found.status in FINAL | {PAUSED}:
                await self._tell(StopJob(job_id, pause=found is not None and found.status == PAUSED))

    async def _count_crash(self, job: Job) -> None:
        crashes = job.crashes + 1
        if crashes >= CRASHES_ALLOWED:
            message = f"The engine crashed {crashes} times while this job ran, without progress in between."
            change = JobChange(
                status=FAILED, crashes=crashes, error={"code": "engine_crashed", "message": message, "param": None},
                events=[NewEvent(message, level="error")],
            )  # fmt: skip
        else:
            message = "The engine restarted; the job goes on from its last checkpoint"
            change = JobChange(
                crashes=crashes, progress={**job.progress, "reason": "engine_restarted"},
                events=[NewEvent(message, level="warn")],
            )  # fmt: skip
        await self._store.jobs.change(job.tenant, job.id, change)
        self.signals.notify(job.id)

    async def _dispatch(self) -> None:
        """Hand waiting jobs to the engine while there are slots: first those that ran before, then the queue."""
        if self._engine.engine is None or self._engine.engine.pid != self._pid or self._draining:
            return
        jobs = await self._store.jobs.all_with_status_for_recovery((QUEUED, RUNNING))
        waiting = [job for job in jobs if job.id not in self._active and job.requested != "pause"]
        waiting.sort(key=lambda job: job.status == QUEUED)
        tenants = {job.id: job.tenant for job in waiting}
        for job_id in to_start([Waiting(job.id, job.crashes) for job in waiting], self._active, self._most_running):
            if await self._tell(StartJob(job_id, tenants[job_id])):
                self._active[job_id] = next(job.crashes for job in waiting if job.id == job_id)

    async def _tell(self, message: Any) -> bool:
        """False if the engine is away; the next reconciliation says it again."""
        try:
            await self._engine.send(message)
        except EngineUnavailable:
            return False
        return True

    # ------------------------------------------------------------------ events

    async def _try_to_catch_up(self, job: Job) -> Job:
        """`_catch_up`; what cannot be applied now (a full disk) is tried again at every tick. The job as it is then."""
        try:
            return await self._catch_up(job)
        except Exception:
            log.exception("the events of job %s could not be applied; they will be read again", job.id)
            self._stuck.add(job.id)
            return await self._store.jobs.find_for_recovery(job.id) or job

    async def _catch_up(self, job: Job) -> Job:
        """Apply everything that the job's event file has beyond what was applied."""
        path = self._data.job(job.id) / "events.jsonl"
        for record in await asyncio.to_thread(read_after, path, job.last_seq):
            await self._apply(job, record)
            job = await self._store.jobs.find_for_recovery(job.id) or job
        return job

    async def _apply(self, job: Job, record: dict[str, Any]) -> bool:
        """Apply the next record of a job; True if the queue may move on because of it."""
        pace = self._paces.setdefault(job.id, Pace())
        translation = translate(job, record, pace)
        effects = await self._on_disk(job, translation)
        try:
            if translation.change.status == SUCCEEDED and job.status != RUNNING:  # it ran on before a pause reached it
                await self._store.jobs.change(job.tenant, job.id, JobChange(status=RUNNING))
            await self._store.progress.apply(job.tenant, job.id, record["seq"], effects)
        except Exception as error:
            if effects.result_file_id is not None:
                await asyncio.to_thread(self._files.discard, job.tenant, effects.result_file_id)
            if not isinstance(error, EventGap):
                raise
            self._stuck.add(job.id)
            return False
        if translation.change.crashes == 0 and job.id in self._active:
            self._active[job.id] = 0
        if translation.released:
            self._active.pop(job.id, None)
            self._paces.pop(job.id, None)
            if job.status in FINAL or translation.change.status in FINAL:
                await asyncio.to_thread(self._preparer.discard, job.id)
        self.signals.notify(job.id)
        return translation.released or translation.change.crashes == 0

    async def _on_disk(self, job: Job, translation: Translation) -> JobEffects:
        """Put in place the files that the event's rows will name."""
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
            file_id, new = await asyncio.to_thread(
                self._files.copy_in, job.tenant, self._data.resolve(translation.result_path), "step_metrics.csv",
                "fine-tune-results",
            )  # fmt: skip
            effects = replace(effects, result_file=new, result_file_id=file_id)
        return effects
