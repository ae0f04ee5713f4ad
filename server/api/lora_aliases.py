"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: vLLM's bodies and answers for clients that speak them.

Loading copies a PEFT folder of the server's disk, so it is for admins; tenants upload theirs to `/v1/adapters`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse

from coserve.server.api.auth import Admin, Caller
from coserve.server.api.dependencies import ServicesOf, body_schema, read_json, validated
from coserve.server.api.errors import clip, invalid, not_found, unsupported
from coserve.server.gateway.adapter_folders import NoAdapterFolder
from coserve.server.gateway.refusals import Invalid

router = APIRouter(tags=["adapters"])


class LoadLora(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = None
    is_3d_lora_weight: bool | None = None


class UnloadLora(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadLora))
async def load_lora_adapter(request: Request, principal: Admin, services: ServicesOf) -> PlainTextResponse:
    """Makes the PEFT folder at `lora_path`, on the server's disk, the adapter `lora_name`; it is copied."""
    wanted = validated(LoadLora, await read_json(request))
    name = wanted.lora_name
    if wanted.is_3d_lora_weight:
        raise unsupported("'is_3d_lora_weight' is not supported by this server; leave it out.", "is_3d_lora_weight")
    if not wanted.load_inplace and await services.store.adapters.by_name(principal.tenant, name) is not None:
        raise invalid(
            f"The lora adapter '{clip(name)}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            "lora_name",
        )
    if not Path(wanted.lora_path).is_absolute():
        raise invalid("'lora_path' must be the absolute path of a PEFT folder on the server's disk.", "lora_path")
    try:
        await services.adapters.upload(principal.tenant, name, folder=Path(wanted.lora_path))
    except NoAdapterFolder as error:
        raise not_found(
            f"Loading lora {clip(name)} failed: No adapter found for {clip(wanted.lora_path)}: {error}",
            param="lora_path",
            code="adapter_not_found",
        ) from None
    except Invalid as refused:
        if refused.param != "name":
            raise
        raise invalid(refused.message.replace("'name'", "'lora_name'"), "lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadLora))
async def unload_lora_adapter(request: Request, caller: Caller, services: ServicesOf) -> PlainTextResponse:
    """Deletes the caller's uploaded adapter of that name; running requests finish on it."""
    name = validated(UnloadLora, await read_json(request)).lora_name
    adapter = await services.store.adapters.by_name(caller.tenant, name)
    if adapter is None:
        raise not_found(
            f"The lora adapter '{clip(name)}' cannot be found.", param="lora_name", code="adapter_not_found"
        )
    if adapter.fine_tuned_model is not None:
        raise invalid(
            f"'{clip(name)}' was trained here and is kept nowhere else: DELETE /v1/adapters/{clip(name)} deletes it.",
            "lora_name",
        )
    await services.adapters.delete(caller.tenant, adapter.id)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
