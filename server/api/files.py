"""Files: uploaded by a tenant, or produced for it, and nobody else's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf
from coserve.server.api.errors import ApiError, clip, invalid, not_found, unsupported
from coserve.server.api.lists import After, list_object
from coserve.server.api.multipart import multipart_form
from coserve.server.store.files import File, NewFile

router = APIRouter(tags=["files"])

PURPOSES = frozenset({"fine-tune", "assistants", "batch", "vision", "user_data", "evals"})
_UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": sorted(PURPOSES)},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", openapi_extra=_UPLOAD_SCHEMA)
async def upload_file(request: Request, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """Store one file. It is there, whole and synced, when this answers; a failed upload leaves nothing."""
    async with multipart_form(request, services.data.tmp, services.settings.max_upload) as form:
        upload = form.only_file("file")
        purpose = form.field("purpose")
        if purpose not in PURPOSES:
            allowed = ", ".join(sorted(PURPOSES))
            raise invalid(f"Invalid value for 'purpose': {clip(purpose)!r} is none of {allowed}.", "purpose")
        if any(name.startswith("expires_after") for name in form.fields):
            raise unsupported("'expires_after' is not supported: files stay until they are deleted.", "expires_after")
        new = NewFile(upload.size, upload.filename, purpose, upload.sha256)
        return file_object(await services.files.keep(caller.tenant, upload.path, new))


@router.get("/v1/files")
async def list_files(
    caller: Caller,
    services: ServicesOf,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The caller's files, newest first unless `order` is asc."""
    page = await services.store.files.list(
        caller.tenant, after=after, limit=limit, purpose=purpose, ascending=order == "asc"
    )
    return list_object([file_object(file) for file in page.items], page.has_more)


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    return file_object(_found(await services.store.files.get(caller.tenant, file_id)))


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """Jobs that have read the file already are not affected."""
    if not await services.files.delete(caller.tenant, file_id):
        raise _unknown_file()
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/v1/files/{file_id}/content")
async def file_content(file_id: str, caller: Caller, services: ServicesOf) -> Response:
    file = _found(await services.store.files.get(caller.tenant, file_id))
    return FileResponse(
        services.files.path(file), filename=file.filename, media_type="application/octet-stream",
        headers={"x-content-type-options": "nosniff"},
    )  # fmt: skip


def file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "expires_at": None,
        "status_details": file.status_details,
    }


def _found(file: File | None) -> File:
    if file is None:
        raise _unknown_file()
    return file


def _unknown_file() -> ApiError:
    return not_found("No such file; GET /v1/files lists yours.", param="file_id", code="file_not_found")
