"""Who may call what: every request needs a key except on two paths, and every route declares its access class.

Authentication happens before routing, so that an unknown path answers 401 like any other to whoever has no key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from coserve.server.api.errors import ApiError
from coserve.server.tenancy.authentication import Authenticator
from coserve.server.tenancy.principal import Principal

PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})
_PRINCIPAL = "coserve.principal"


class Access(StrEnum):
    PUBLIC = "public"
    KEY = "key"
    ADMIN = "admin"


class Authentication:
    """ASGI middleware: 401 without a valid bearer key, else the principal is attached to the request."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self.app = app
        self.authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            try:
                scope[_PRINCIPAL] = await self.identify(Headers(scope=scope))
            except ApiError as error:
                return await error.response()(scope, receive, send)
        return await self.app(scope, receive, send)

    async def identify(self, headers: Headers) -> Principal:
        values = headers.getlist("authorization")
        if not values:
            raise _unauthorized("You didn't provide an API key: send it as `Authorization: Bearer sk-cs-…`.")
        principal = await self.authenticator.authenticate(values[0]) if len(values) == 1 else None
        if principal is None:
            raise _unauthorized("Incorrect API key provided: send one key, as `Authorization: Bearer sk-cs-…`.")
        return principal


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, headers={"www-authenticate": "Bearer"})


def public() -> None:
    """Declares a route that answers without a key."""


def caller(request: Request) -> Principal:
    """Declares a route that any key may call, and gives whom it stands for."""
    principal: Principal | None = request.scope.get(_PRINCIPAL)
    if principal is None:
        raise _unauthorized("You didn't provide an API key: send it as `Authorization: Bearer sk-cs-…`.")
    return principal


def admin(request: Request) -> Principal:
    """Declares a route for admin keys only."""
    principal = caller(request)
    if not principal.admin:
        raise ApiError(403, "This route needs an admin key.")
    return principal


Caller = Annotated[Principal, Depends(caller)]
Admin = Annotated[Principal, Depends(admin)]
Public = Depends(public)

_DECLARES: dict[Callable[..., Any], Access] = {public: Access.PUBLIC, caller: Access.KEY, admin: Access.ADMIN}


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """One line of the route table."""

    method: str
    path: str
    access: Access


def route_table(routers: Iterable[APIRouter]) -> tuple[RouteEntry, ...]:
    """Every route with its access class. Raises TypeError for a route that declares none, or more than one."""
    entries: list[RouteEntry] = []
    for router in routers:
        for route in router.routes:
            if not isinstance(route, APIRoute):
                raise TypeError(f"the route {route!r} has no access class: only plain routes are served")
            declared = {_DECLARES[d.call] for d in route.dependant.dependencies if d.call in _DECLARES}
            if len(declared) != 1:
                raise TypeError(f"{route.path} declares {len(declared)} access classes: one of Caller, Admin, Public")
            access = declared.pop()
            if (access is Access.PUBLIC) != (route.path in PUBLIC_PATHS):
                raise TypeError(f"{route.path} is declared {access}, but the public paths are {sorted(PUBLIC_PATHS)}")
            entries += [RouteEntry(method, route.path, access) for method in sorted(route.methods or ())]
    return tuple(sorted(entries, key=lambda entry: (entry.path, entry.method)))
