"""Builds the FastAPI application from its services: routers, middleware, error handlers; starts nothing."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

import coserve
from coserve.server.api import (
    adapters,
    chat,
    checkpoint_permissions,
    completions,
    files,
    fine_tuning,
    iterations,
    keys,
    lora_aliases,
    models,
    queue,
    service,
    tokenize,
)
from coserve.server.api.auth import Authentication, route_table
from coserve.server.api.errors import ERROR_SCHEMA, ApiError, clip, from_faults, from_refusal, from_status, invalid
from coserve.server.api.middleware import ErrorBoundary, Limits, RequestId
from coserve.server.gateway.refusals import Refused
from coserve.server.gateway.services import Services
from coserve.server.store.errors import UnknownCursor

# models comes last: its {id:path} would swallow what stands behind it
ROUTERS: tuple[APIRouter, ...] = (
    service.router,
    chat.router,
    completions.router,
    tokenize.router,
    files.router,
    fine_tuning.router,
    checkpoint_permissions.router,
    adapters.router,
    lora_aliases.router,
    keys.router,
    iterations.router,
    queue.router,
    models.router,
)

UPLOAD_PATHS = ("/v1/files", "/v1/adapters")


def create_app(services: Services) -> FastAPI:
    """The application. Raises TypeError if a route declares no access class."""
    route_table(ROUTERS)
    settings = services.settings
    app = FastAPI(
        title="coserve",
        version=coserve.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # served by a route of ours, which asks for a key
        redirect_slashes=False,
        responses={"default": {"description": "An error", "content": {"application/json": {"schema": ERROR_SCHEMA}}}},
        middleware=[
            Middleware(RequestId),
            Middleware(ErrorBoundary),
            Middleware(
                Limits,
                max_header=settings.max_header,
                max_body=settings.max_body,
                larger=dict.fromkeys(UPLOAD_PATHS, settings.max_upload + 1024**2),  # multipart's own lines
            ),
            Middleware(Authentication, authenticator=services.authenticator),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Refused: _refused,
            RequestValidationError: _validation_error,
            UnknownCursor: _unknown_cursor,
        },
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    return app


async def _api_error(_: Request, error: Any) -> Response:
    return error.response()


async def _refused(_: Request, error: Any) -> Response:
    return from_refusal(error).response()


async def _unknown_cursor(*_: Any) -> Response:
    return invalid("Invalid value for 'after': it names nothing in this list.", "after").response()


async def _http_error(request: Request, error: Any) -> Response:
    target = f"{request.method} {clip(request.url.path)}"
    if error.status_code == 404:
        return ApiError(404, f"Unknown URL: {target}.", code="unknown_url").response()
    if error.status_code == 405:
        return ApiError(405, f"{target}: this path does not take this method.", headers=error.headers).response()
    return from_status(error.status_code, str(error.detail), error.headers).response()


async def _validation_error(_: Request, error: Any) -> Response:
    return from_faults(error.errors(), skip=1).response()  # the first part says where: query, path, body
