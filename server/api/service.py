"""Routes about the server itself: alive, ready, metrics, and the description of the API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from coserve.server.api.auth import Admin, Caller, Public
from coserve.server.api.dependencies import ServicesOf
from coserve.server.api.errors import unavailable

router = APIRouter(tags=["service"])


@router.get("/healthz", dependencies=[Public])
async def healthz() -> dict[str, str]:
    """The process answers; says nothing about what it depends on."""
    return {"status": "ok"}


@router.get("/readyz", dependencies=[Public])
async def readyz(services: ServicesOf) -> dict[str, str]:
    """Ready to generate: an engine is connected and heard of, and the server is not draining."""
    if services.draining:
        raise unavailable("The server is shutting down.", code="draining")
    if not services.engine.ready:
        raise unavailable("The engine is not ready yet.")
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(services: ServicesOf, _: Admin) -> Response:
    """Prometheus exposition. For admins: the load of one tenant is no business of another."""
    body, content_type = services.metrics.exposition()
    return Response(body, headers={"content-type": content_type})


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: Caller) -> JSONResponse:
    description: dict[str, Any] = request.app.openapi()
    return JSONResponse(description)
