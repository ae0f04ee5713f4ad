"""API keys, for admins: made for a tenant, listed, revoked. The secret is shown once, by the answer that makes it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from coserve.server.api.auth import Admin
from coserve.server.api.dependencies import ServicesOf, body_schema, read_json, validated
from coserve.server.api.errors import invalid, not_found
from coserve.server.api.lists import After, list_object
from coserve.server.store.keys import ApiKey
from coserve.server.tenancy.issuing import issue_key

router = APIRouter(prefix="/v1/organization/api_keys", tags=["keys"])


class CreateKey(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tenant: str = Field(min_length=1, max_length=64)
    name: str | None = Field(default=None, min_length=1, max_length=128)


@router.post("", openapi_extra=body_schema(CreateKey))
async def create_key(request: Request, _: Admin, services: ServicesOf) -> dict[str, Any]:
    """A key of the tenant called `tenant`, which is made if there is none. `key` is the secret."""
    wanted = validated(CreateKey, await read_json(request))
    try:
        tenant, key, secret = await issue_key(services.store, wanted.tenant, wanted.name)
    except ValueError as error:
        raise invalid(f"Invalid value for 'tenant': {error}.", "tenant") from None
    return {**_object(key, tenant.name), "key": secret}


@router.get("")
async def list_keys(
    _: Admin, services: ServicesOf, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """Live keys of all tenants, newest first, without their secrets."""
    page = await services.store.keys.list_for_admin(after=after, limit=limit)
    names: dict[str, str] = {}
    for key in page.items:
        if key.tenant not in names:
            tenant = await services.store.tenants.get(key.tenant)
            names[key.tenant] = tenant.name if tenant else key.tenant
    return list_object([_object(key, names[key.tenant]) for key in page.items], page.has_more)


@router.delete("/{key_id}")
async def delete_key(key_id: str, _: Admin, services: ServicesOf) -> dict[str, Any]:
    """From now on the key authenticates nobody."""
    if not await services.store.keys.revoke_for_admin(key_id):
        raise not_found("No such key; GET /v1/organization/api_keys lists them.", param="key_id", code="key_not_found")
    return {"id": key_id, "object": "organization.api_key.deleted", "deleted": True}


def _object(key: ApiKey, tenant_name: str) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "organization.api_key",
        "name": key.name,
        "tenant": tenant_name,
        "redacted_value": key.redacted,
        "created_at": key.created_at,
    }
