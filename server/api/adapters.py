"""Adapters: PEFT folders that a tenant uploads or trains, each a name with immutable versions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf
from coserve.server.api.errors import clip, invalid
from coserve.server.api.lists import After, list_object
from coserve.server.api.multipart import multipart_form
from coserve.server.gateway.services import Services
from coserve.server.store.adapters import Adapter, AdapterVersion

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

_UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "name"],
                    "properties": {"file": {"type": "string", "format": "binary"}, "name": {"type": "string"}},
                }
            }
        },
    }
}


@router.post("", openapi_extra=_UPLOAD_SCHEMA)
async def upload_adapter(request: Request, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """`file` is a tar of a PEFT folder, or its two files. The same name again makes a new version."""
    async with multipart_form(request, services.data.tmp, services.settings.max_upload) as form:
        name = services.adapters.check_name(form.field("name"))
        uploads = form.files.get("file", [])
        if len(uploads) == 2:
            files = {upload.filename: upload.path for upload in uploads}
            adapter, version = await services.adapters.upload(caller.tenant, name, files=files)
        else:
            archive = form.only_file("file").path
            adapter, version = await services.adapters.upload(caller.tenant, name, archive=archive)
    return adapter_object(adapter, version)


@router.get("")
async def list_adapters(
    caller: Caller, services: ServicesOf, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    page = await services.store.adapters.list(caller.tenant, after=after, limit=limit)
    return list_object([await _shown(services, adapter) for adapter in page.items], page.has_more)


@router.get("/{adapter_id:path}/versions")
async def list_versions(adapter_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    adapter = await services.adapters.find(caller.tenant, check_reference(adapter_id))
    versions = await services.store.adapters.versions(caller.tenant, adapter.id)
    return list_object([version_object(adapter, version) for version in versions or ()], has_more=False)


@router.get("/{adapter_id:path}/download")
async def download_adapter(adapter_id: str, caller: Caller, services: ServicesOf) -> Response:
    """A tar of the PEFT folder, the same bytes for the same version. Takes what `model` may be, except the base."""
    download = await services.adapters.download(caller.tenant, check_reference(adapter_id))
    headers = {
        "content-length": str(download.size),
        "content-disposition": f'attachment; filename="{download.filename}"',
    }
    return StreamingResponse(download.parts, headers=headers, media_type="application/x-tar")


@router.post("/{adapter_id:path}/pin")
async def pin_adapter(adapter_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """Marks an adapter as one to keep."""
    adapter = await services.adapters.pin(caller.tenant, check_reference(adapter_id), True)
    return await _shown(services, adapter)


@router.post("/{adapter_id:path}/unpin")
async def unpin_adapter(adapter_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    adapter = await services.adapters.pin(caller.tenant, check_reference(adapter_id), False)
    return await _shown(services, adapter)


@router.get("/{adapter_id:path}")
async def retrieve_adapter(adapter_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    return await _shown(services, await services.adapters.find(caller.tenant, check_reference(adapter_id)))


@router.delete("/{adapter_id:path}")
async def delete_adapter(adapter_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """New requests no longer find it; running ones finish on it."""
    adapter = await services.adapters.delete(caller.tenant, check_reference(adapter_id))
    return {"id": adapter.id, "object": "adapter", "deleted": True}


def check_reference(reference: str) -> str:
    """An id or name as it may stand in a path; what looks like a way out of somewhere is a 400."""
    parts = reference.split("/")
    odd = any(part in ("", ".", "..") for part in parts) or "\\" in reference or "%" in reference
    if odd or not reference.isprintable() or len(reference) > 512:
        raise invalid(f"{clip(reference)!r} is no adapter's id or name.", "adapter_id")
    return reference


def adapter_object(adapter: Adapter, newest: AdapterVersion | None) -> dict[str, Any]:
    return {
        "id": adapter.id,
        "object": "adapter",
        "name": adapter.name,
        "created_at": adapter.created_at,
        "fine_tuned_model": adapter.fine_tuned_model,
        "pinned": adapter.pinned,
        "version": newest.number if newest else None,
        "digest": newest.digest if newest else None,
        "rank": newest.rank if newest else None,
        "bytes": newest.bytes if newest else None,
    }


def version_object(adapter: Adapter, version: AdapterVersion) -> dict[str, Any]:
    return {
        "id": f"{adapter.name}@{version.digest[:12]}",
        "object": "adapter.version",
        "adapter_id": adapter.id,
        "version": version.number,
        "digest": version.digest,
        "rank": version.rank,
        "bytes": version.bytes,
        "created_at": version.created_at,
        "fine_tuning_job_id": version.job_id,
        "step_number": version.step,
    }


async def _shown(services: Services, adapter: Adapter) -> dict[str, Any]:
    return adapter_object(adapter, await services.store.adapters.newest_version(adapter.tenant, adapter.id))
