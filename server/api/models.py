"""`/v1/models`: the base model and what the tenant's own adapters add to it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf
from coserve.server.api.errors import clip, invalid, model_not_found
from coserve.server.gateway.refusals import NotFound
from coserve.server.gateway.services import Services
from coserve.server.store.adapters import Adapter
from coserve.server.tenancy.principal import Principal

router = APIRouter(tags=["models"])

_PAGE = 200


@router.get("/v1/models")
async def list_models(services: ServicesOf, principal: Caller) -> dict[str, Any]:
    """The base first, then the tenant's adapters that can answer, newest first; always all of them."""
    found = [_base(services)]
    after: str | None = None
    while True:
        page = await services.store.adapters.list(principal.tenant, after=after, limit=_PAGE)
        for adapter in page.items:
            if await services.store.adapters.newest_version(principal.tenant, adapter.id) is not None:
                found.append(_adapter(services, principal, adapter))
        if not page.has_more:
            break
        after = page.items[-1].id
    return {"object": "list", "data": found, "has_more": False}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, services: ServicesOf, principal: Caller) -> dict[str, Any]:
    if model == services.settings.base_model_id:
        return _base(services)
    resolved = await services.store.models.resolve(principal.tenant, model, project=principal.tenant_name)
    if resolved is None:
        raise model_not_found(model)
    store = services.store
    owner = await store.tenants.get(resolved.tenant)
    adapter = await store.adapters.get(resolved.tenant, resolved.adapter_id) if resolved.adapter_id else None
    job = await store.jobs.get(resolved.tenant, resolved.job_id) if adapter is None and resolved.job_id else None
    made = adapter or job  # a job's checkpoint is no adapter's version
    return _model(services, model, made.created_at if made else 0, owner.name if owner else "", adapted=True)


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, services: ServicesOf, principal: Caller) -> dict[str, Any]:
    """Deletes an adapter by any of its names. Requests that use it finish; new ones get 404."""
    if model == services.settings.base_model_id:
        raise invalid("The base model cannot be deleted.", "model")
    try:
        await services.adapters.delete(principal.tenant, model)
    except NotFound:
        if await services.store.models.resolve(principal.tenant, model) is not None:
            raise invalid(
                f"`{clip(model)}` is a checkpoint or a single version, which cannot be deleted by itself; delete its "
                "adapter, or the job's `fine_tuned_model`.",
                "model",
            ) from None
        raise model_not_found(model) from None
    return {"id": model, "object": "model", "deleted": True}


def _base(services: Services) -> dict[str, Any]:
    return _model(services, services.settings.base_model_id, services.started_at, "coserve", adapted=False)


def _adapter(services: Services, principal: Principal, adapter: Adapter) -> dict[str, Any]:
    model_id = adapter.fine_tuned_model or adapter.name
    return _model(services, model_id, adapter.created_at, principal.tenant_name, adapted=True)


def _model(services: Services, model_id: str, created: int, owner: str, *, adapted: bool) -> dict[str, Any]:
    base = services.settings.base_model_id
    engine = services.engine.known
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "root": base,
        "parent": base if adapted else None,
        "max_model_len": engine.max_model_len if engine else None,
    }
