"""What the engine ran in its latest iterations: the evidence that generation and training share them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from coserve.server.api.auth import Admin
from coserve.server.api.dependencies import ServicesOf
from coserve.server.api.errors import unavailable
from coserve.server.gateway.engine_client import EngineUnavailable

router = APIRouter(tags=["service"])


@router.get("/v1/coserve/iterations")
async def list_iterations(
    _: Admin, services: ServicesOf, limit: Annotated[int, Query(ge=1, le=2000)] = 100
) -> dict[str, Any]:
    """The latest iterations as the engine recorded them. For admins: they show what all tenants run."""
    try:
        answer = await services.engine.get_iterations(limit)
    except EngineUnavailable:
        raise unavailable("The engine is not available; try again in a moment.") from None
    return {"object": "list", "data": list(answer.data)}
