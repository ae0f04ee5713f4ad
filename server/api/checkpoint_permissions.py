"""Permissions of finetuned models and checkpoints: their owner lets other projects ask them, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf, body_schema, read_json, validated
from coserve.server.api.errors import ApiError, clip, not_found
from coserve.server.api.lists import After, list_object
from coserve.server.store.permissions import Permission

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["fine-tuning"])

Project = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class CreatePermissions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    project_ids: Annotated[list[Project], Field(fail_fast=True, min_length=1, max_length=100)]


@router.post("/{fine_tuned_model_checkpoint:path}/permissions", openapi_extra=body_schema(CreatePermissions))
async def create_permissions(
    fine_tuned_model_checkpoint: str, request: Request, caller: Caller, services: ServicesOf
) -> dict[str, Any]:
    """Lets the projects, which are tenants by name, ask the caller's model. Weights and job stay the caller's alone."""
    permissions = services.store.permissions
    if await permissions.list(caller.tenant, fine_tuned_model_checkpoint, limit=1) is None:
        raise _unknown_checkpoint(fine_tuned_model_checkpoint)
    wanted = validated(CreatePermissions, await read_json(request))
    granted = await permissions.grant(caller.tenant, fine_tuned_model_checkpoint, wanted.project_ids)
    if granted is None:
        raise _unknown_checkpoint(fine_tuned_model_checkpoint)
    return list_object([permission_object(one) for one in granted], has_more=False)


@router.get("/{fine_tuned_model_checkpoint:path}/permissions")
async def list_permissions(
    fine_tuned_model_checkpoint: str,
    caller: Caller,
    services: ServicesOf,
    project_id: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    order: Literal["ascending", "descending"] = "descending",
) -> dict[str, Any]:
    """Newest first unless `order` is ascending."""
    page = await services.store.permissions.list(
        caller.tenant, fine_tuned_model_checkpoint, project=project_id, after=after, limit=limit,
        ascending=order == "ascending",
    )  # fmt: skip
    if page is None:
        raise _unknown_checkpoint(fine_tuned_model_checkpoint)
    return list_object([permission_object(one) for one in page.items], page.has_more)


@router.delete("/{fine_tuned_model_checkpoint:path}/permissions/{permission_id}")
async def delete_permission(
    fine_tuned_model_checkpoint: str, permission_id: str, caller: Caller, services: ServicesOf
) -> dict[str, Any]:
    """New requests of the project no longer find the model."""
    if not await services.store.permissions.revoke(caller.tenant, permission_id, fine_tuned_model_checkpoint):
        raise not_found(
            "No such permission; GET the checkpoint's permissions lists them.",
            param="permission_id",
            code="permission_not_found",
        )
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def permission_object(permission: Permission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project,
    }


def _unknown_checkpoint(model_id: str) -> ApiError:
    return not_found(
        f"You have no finetuned model or checkpoint `{clip(model_id)}`; GET a job's checkpoints lists them.",
        param="fine_tuned_model_checkpoint",
        code="checkpoint_not_found",
    )
