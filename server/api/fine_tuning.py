"""Finetuning jobs: create, look up, steer, and follow their events."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf, body_schema, read_json, validated
from coserve.server.api.errors import invalid, storage_unavailable
from coserve.server.api.fine_tuning_models import CreateJob, checkpoint_object, event_object, job_object
from coserve.server.api.lists import After, list_object
from coserve.server.gateway.job_service import job_not_found
from coserve.server.gateway.services import Services
from coserve.server.gateway.sse import DONE, KEEPALIVE, EventStream, event
from coserve.server.store.errors import StoreUnavailable
from coserve.server.store.submissions import Submission
from coserve.server.store.transitions import FINAL
from coserve.server.tenancy.principal import Principal

log = logging.getLogger("coserve.jobs")

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Limit = Annotated[int, Query(ge=1, le=1000)]
_METADATA = re.compile(r"metadata\[(?P<key>.{1,64})\]")


@router.post("", openapi_extra=body_schema(CreateJob))
async def create_job(request: Request, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """A job that is durable when this answers. The same request sent again by a retrying client is the same job."""
    body = await read_json(request)
    wanted = validated(CreateJob, body).job_request()
    job = await services.jobs.create(caller, wanted, _submission(request, caller, body))
    return job_object(await services.jobs.shown(job), caller.tenant_name)


@router.get("")
async def list_jobs(
    request: Request, caller: Caller, services: ServicesOf, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """The caller's jobs, newest first; `metadata[key]=value` keeps those that carry the pair."""
    metadata = {}
    for name, value in request.query_params.multi_items():
        match = _METADATA.fullmatch(name)
        if match is not None:
            metadata[match["key"]] = value
    if len(metadata) > 16:
        raise invalid("Give at most 16 metadata pairs.", "metadata")
    page = await services.store.jobs.list(caller.tenant, after=after, limit=limit, metadata=metadata)
    jobs = await services.jobs.all_shown(page.items)
    return list_object([job_object(job, caller.tenant_name) for job in jobs], page.has_more)


@router.get("/{fine_tuning_job_id}")
async def retrieve_job(fine_tuning_job_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    return job_object(await services.jobs.get(caller.tenant, fine_tuning_job_id), caller.tenant_name)


@router.post("/{fine_tuning_job_id}/cancel")
async def cancel_job(fine_tuning_job_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    return job_object(await services.jobs.cancel(caller.tenant, fine_tuning_job_id), caller.tenant_name)


@router.post("/{fine_tuning_job_id}/pause")
async def pause_job(fine_tuning_job_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    return job_object(await services.jobs.pause(caller.tenant, fine_tuning_job_id), caller.tenant_name)


@router.post("/{fine_tuning_job_id}/resume")
async def resume_job(fine_tuning_job_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    return job_object(await services.jobs.resume(caller.tenant, fine_tuning_job_id), caller.tenant_name)


@router.get("/{fine_tuning_job_id}/events")
async def list_events(
    fine_tuning_job_id: str,
    caller: Caller,
    services: ServicesOf,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
) -> Response:
    """Newest first; with `stream`, all from the oldest on, and then each as it happens until the job has ended."""
    if stream:
        await services.jobs.get(caller.tenant, fine_tuning_job_id)
        return EventStream(_follow(services, caller.tenant, fine_tuning_job_id), closed=_nothing)
    page = await services.store.events.list(caller.tenant, fine_tuning_job_id, after=after, limit=limit)
    if page is None:
        raise job_not_found()
    return JSONResponse(list_object([event_object(one) for one in page.items], page.has_more))


@router.get("/{fine_tuning_job_id}/checkpoints")
async def list_checkpoints(
    fine_tuning_job_id: str, caller: Caller, services: ServicesOf, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    """Checkpoints that answer requests now, newest first."""
    page = await services.store.checkpoints.list(caller.tenant, fine_tuning_job_id, after=after, limit=limit)
    if page is None:
        raise job_not_found()
    return list_object([checkpoint_object(one) for one in page.items], page.has_more)


async def _follow(services: Services, tenant: str, job_id: str) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(_events(services, tenant, job_id)) as chunks:
            async for chunk in chunks:
                yield chunk
    except StoreUnavailable as error:  # a stream that merely stopped would look complete to the client
        log.error("the events of job %s could not be read: %s", job_id, error)
        yield event(storage_unavailable().body())


async def _events(services: Services, tenant: str, job_id: str) -> AsyncGenerator[bytes, None]:
    signals, position = services.controller.signals, 0
    while True:
        ticket = signals.ticket(job_id)
        try:
            job = await services.store.jobs.get(tenant, job_id)
            events = await services.store.events.since(tenant, job_id, position)
            for one in events or ():
                position = one.position
                yield event(event_object(one))
            if events:
                continue
            if job is None or job.status in FINAL:
                yield DONE
                return
            if not await signals.wait(job_id, ticket, services.settings.keepalive_seconds):
                yield KEEPALIVE
        finally:
            signals.give_back(job_id, ticket)


def _nothing() -> None:
    """Whatever ends the stream, `_events` gives back its own ticket."""


def _submission(request: Request, caller: Principal, body: dict[str, Any]) -> Submission:
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise invalid("The Idempotency-Key header must have 1 to 255 printable characters.", "Idempotency-Key")
    retries = request.headers.get("x-stainless-retry-count", "")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return Submission(
        hashlib.sha256(canonical).hexdigest(), caller.key_id, key, is_retry=retries.isdecimal() and int(retries[:9]) > 0
    )
