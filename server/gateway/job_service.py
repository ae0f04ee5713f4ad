"""What tenants do with finetuning jobs: create, look up, cancel, pause, resume. The controller moves them along."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, inf
from typing import Any

from coserve.server.gateway.adapter_folders import read_config
from coserve.server.gateway.engine_client import EngineClient
from coserve.server.gateway.job_controller import JobController
from coserve.server.gateway.job_outlook import with_outlook
from coserve.server.gateway.job_preparation import targets_message, unknown_targets
from coserve.server.gateway.job_queue import Waiting, in_turns
from coserve.server.gateway.job_spec import (
    JobRequest,
    fine_tuned_model_id,
    full_adapter,
    full_hyperparameters,
    full_training,
    supervised,
)
from coserve.server.gateway.refusals import Conflict, Invalid, NotFound, QueueFull
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.errors import IdempotencyConflict, InvalidTransition
from coserve.server.store.ids import ADAPTER, JOB, new_id
from coserve.server.store.job_events import NewEvent
from coserve.server.store.jobs import Job, NewJob
from coserve.server.store.resolve import ResolvedModel
from coserve.server.store.store import Store
from coserve.server.store.submissions import Submission
from coserve.server.store.transitions import QUEUED, RUNNING, VALIDATING
from coserve.server.tenancy.principal import Principal

PAUSE_PATIENCE_SECONDS = 8.0


class JobService:
    def __init__(
        self,
        store: Store,
        data: DataDirectory,
        engine: EngineClient,
        controller: JobController,
        *,
        base_model_id: str,
        most_queued: int,
        most_running: int,
    ) -> None:
        self._store = store
        self._data = data
        self._engine = engine
        self._controller = controller
        self._base_model_id = base_model_id
        self._most_queued = most_queued
        self._most_running = most_running
        self._creating = asyncio.Lock()  # so that no burst passes the bound of the queue

    async def create(self, principal: Principal, request: JobRequest, submission: Submission) -> Job:
        """A new job, durable when this returns; or the one that an equal submission made before.

        Raises Invalid, NotFound (the model), Conflict (an idempotency key with another body), QueueFull.
        """
        tenant = principal.tenant
        async with self._creating:
            try:
                earlier = await self._store.jobs.submitted(tenant, submission)
                if earlier is not None:
                    return earlier
                if await self._store.jobs.count(tenant, (VALIDATING, QUEUED)) >= self._most_queued:
                    raise QueueFull(
                        f"You have {self._most_queued} jobs waiting, the most allowed; try again when some have begun.",
                        "rate_limit_exceeded",
                    )
                new = await self._new_job(principal, request)
                job_id = new_id(JOB)
                model = fine_tuned_model_id(self._base_model_id, principal.tenant_name, new.suffix, job_id)
                job, fresh = await self._store.jobs.create(
                    tenant, replace(new, fine_tuned_model=model, adapter_id=new_id(ADAPTER)), submission=submission,
                    job_id=job_id, events=[
                        NewEvent(f"Created fine-tuning job: {job_id}"),
                        NewEvent(f"Validating training file: {new.training_file}"),
                    ],
                )  # fmt: skip
            except IdempotencyConflict as error:
                raise Conflict(str(error), "idempotency_key_reused") from None
        if fresh:
            self._controller.prepare(job)
        return job

    async def _new_job(self, principal: Principal, request: JobRequest) -> NewJob:
        tenant = principal.tenant
        adapter = full_adapter(request.adapter)
        start = await self._start(tenant, request)
        if start is not None:
            adapter = await self._continued(request, adapter, start)
        await self._check_file(tenant, "training_file", request.training_file)
        if request.validation_file is not None:
            await self._check_file(tenant, "validation_file", request.validation_file)
        engine = self._engine.known
        if engine is not None and (unknown := unknown_targets(adapter, engine)):
            raise Invalid(targets_message(unknown, engine), "invalid_value", "adapter.target_modules")
        hyperparameters = full_hyperparameters(request.hyperparameters)
        return NewJob(
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            suffix=request.suffix,
            metadata=request.metadata,
            method=supervised(hyperparameters),
            hyperparameters=hyperparameters,
            adapter=adapter,
            training=full_training(request.training, request.hyperparameters),
        )

    async def _start(self, tenant: str, request: JobRequest) -> ResolvedModel | None:
        """The adapter version that training starts from; None for a fresh one."""
        init = request.adapter.get("init", "default")
        if request.model != self._base_model_id:
            model = await self._store.models.resolve(tenant, request.model)
            if model is None:
                raise NotFound(
                    f"The model {request.model!r} does not exist or you do not have access to it; "
                    "GET /v1/models lists yours.", "model_not_found", "model",
                )  # fmt: skip
            if init != "default":
                raise Invalid(
                    "Give 'adapter.init', or a finetuned 'model' to go on from.", "invalid_value", "adapter.init"
                )
            return model
        if init == "default":
            return None
        model = await self._store.models.resolve(tenant, init.removeprefix("adapter:"))
        if model is None:
            raise Invalid(
                "No such adapter to start from; GET /v1/adapters lists yours.", "adapter_not_found", "adapter.init"
            )
        return model

    async def _continued(self, request: JobRequest, adapter: dict[str, Any], start: ResolvedModel) -> dict[str, Any]:
        """An adapter keeps its shape when training goes on from it."""
        try:
            config = await asyncio.to_thread(read_config, self._data.resolve(start.path))
        except FileNotFoundError:
            raise Invalid("The adapter to start from is being deleted.", "adapter_not_found", "adapter.init") from None
        shape = {
            "r": config.get("r", 8), "alpha": config.get("lora_alpha", 8), "dropout": config.get("lora_dropout", 0.0),
            "target_modules": config.get("target_modules"),
        }  # fmt: skip
        for name, value in shape.items():
            given = request.adapter.get(name, value)
            if _unordered(given) != _unordered(value):
                raise Invalid(
                    f"'adapter.{name}' differs from that of the adapter to start from; leave it out.", "invalid_value",
                    f"adapter.{name}",
                )  # fmt: skip
        return {**adapter, **shape, "init": f"adapter:{start.model_id}", "init_path": start.path}

    async def _check_file(self, tenant: str, param: str, file_id: str) -> None:
        file = await self._store.files.get(tenant, file_id)
        if file is None:
            raise Invalid(
                f"The file given as '{param}' does not exist; GET /v1/files lists yours.", "file_not_found", param
            )
        if file.purpose != "fine-tune":
            raise Invalid(
                f"The file given as '{param}' was uploaded with another purpose; upload it with purpose 'fine-tune'.",
                "invalid_file_purpose", param,
            )  # fmt: skip

    # ------------------------------------------------------------------ an existing job

    async def get(self, tenant: str, job_id: str) -> Job:
        """Raises NotFound."""
        return await self.shown(_found(await self._store.jobs.get(tenant, job_id)))

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Idempotent. Raises NotFound, Conflict for a job that ended otherwise."""
        try:
            return _found(await self._controller.cancel(tenant, job_id))
        except InvalidTransition as error:
            raise _illegal(error) from None

    async def pause(self, tenant: str, job_id: str) -> Job:
        """Idempotent. Raises NotFound, Conflict."""
        try:
            return await self.shown(_found(await self._controller.pause(tenant, job_id, PAUSE_PATIENCE_SECONDS)))
        except InvalidTransition as error:
            raise _illegal(error) from None

    async def resume(self, tenant: str, job_id: str) -> Job:
        """Raises NotFound, Conflict for a job that is not paused."""
        try:
            return await self.shown(_found(await self._controller.resume(tenant, job_id)))
        except InvalidTransition as error:
            raise _illegal(error) from None

    async def shown(self, job: Job) -> Job:
        """The job with what only the moment knows: its place in the queue, and why it waits."""
        return (await self.all_shown((job,)))[0]

    async def all_shown(self, jobs: Sequence[Job]) -> list[Job]:
        """`shown` for each."""
        jobs = self._with_outlook(jobs)
        places: dict[str, int] = {}
        free, ends = 0, list[float]()
        if any(job.status == QUEUED for job in jobs):
            known = await self._store.jobs.all_with_status_for_recovery((QUEUED, RUNNING))
            queue = [Waiting(job.id, job.crashes, job.tenant) for job in known if job.status == QUEUED]
            running = self._with_outlook([job for job in known if job.status == RUNNING])
            weights = await self._controller.weights.of(job.tenant for job in known)
            turns = in_turns(queue, Counter(job.tenant for job in running), weights)
            places = {one.job_id: place for place, one in enumerate(turns, start=1)}
            free = self._most_running - len(running)
            etas = [job.progress.get("eta_seconds") for job in running]
            ends = sorted(inf if eta is None else eta for eta in etas)
        return [replace(job, progress={**job.progress, **self._moment(job, places, free, ends)}) for job in jobs]

    def _with_outlook(self, jobs: Sequence[Job]) -> list[Job]:
        report = self._engine.stats if self._engine.engine is not None else None
        return [with_outlook(job, report, time.monotonic(), time.time()) for job in jobs]

    def _moment(self, job: Job, places: Mapping[str, int], free: int, ends: Sequence[float]) -> dict[str, Any]:
        """`ends`: seconds that the running jobs still take, those last that do not know."""
        if job.status == QUEUED:
            place = places.get(job.id)
            reason = f"waiting for a slot: at most {self._most_running} jobs run at once"
            if self._engine.engine is None:
                reason = "waiting for the engine"
            elif place is None or place <= free:
                reason = "starting"
            wait = 0.0 if place is None or place <= free else _nth(ends, place - free)
            return {"queue_position": place, "reason": reason, "expected_wait_seconds": wait}
        if job.status == VALIDATING and self._engine.known is None:
            return {"reason": "waiting for the engine"}
        return {"reason": "pausing"} if job.status == RUNNING and job.requested == "pause" else {}


def _nth(ends: Sequence[float], place: int) -> float | None:
    """When so many slots will have become free, if jobs that begin meanwhile take longer; None where nobody knows. In
    whole tens of seconds: another tenant's job is nobody's to watch."""
    seconds = ends[place - 1] if place <= len(ends) else inf
    return None if seconds == inf else 10.0 * ceil(seconds / 10.0)


def _unordered(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list) else value


def _found(job: Job | None) -> Job:
    if job is None:
        raise job_not_found()
    return job


def job_not_found() -> NotFound:
    return NotFound(
        "No such fine-tuning job; GET /v1/fine_tuning/jobs lists yours.", "job_not_found", "fine_tuning_job_id"
    )


def _illegal(error: InvalidTransition) -> Conflict:
    return Conflict(str(error), "invalid_state_transition")
