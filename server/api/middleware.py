"""What wraps every request: an id, an error object for whatever goes wrong, and limits on headers and bodies.

Plain ASGI throughout: a wrapper that runs the application in a task of its own would hide a client's disconnect.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import traceback
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve.server.api.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    clip,
    from_status,
    internal_error,
    storage_unavailable,
)
from coserve.server.store.errors import StoreUnavailable

log = logging.getLogger("coserve.http")

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_DISCARD_BYTES = 64 * 1024**2
_DISCARD_SECONDS = 2.0


class RequestId:
    """Gives every response an `x-request-id`, and logs method, path, status and seconds: no query, header or body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _CLIENT_REQUEST_ID.fullmatch(given) else new_request_id()
        scope["coserve.request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            level = logging.DEBUG if scope["path"] in ("/healthz", "/readyz", "/metrics") else logging.INFO
            log.log(level, "%s %s %s %.3fs %s", scope["method"], _printable(scope["path"]), status, seconds, request_id)


class ErrorBoundary:
    """Turns whatever escapes the application into the error object; a response already begun is cut off."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = False
        plain: _PlainError | None = None

        async def watched(message: Message) -> None:
            nonlocal begun, plain
            if message["type"] == "http.response.start":
                begun = True
                plain = _PlainError.of(message)
            if plain is None:
                await send(message)
            elif message["type"] == "http.response.body" and plain.complete(message):
                await plain.error().response()(scope, receive, send)

        try:
            await self.app(scope, receive, watched)
        except ApiError as error:
            if not begun:
                await error.response()(scope, receive, send)
        except ClientDisconnect:  # in the middle of its body
            if not begun:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
        except StoreUnavailable as error:
            log.error("%s: the store failed: %s", scope.get("coserve.request_id"), error)
            if not begun:
                await storage_unavailable().response()(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the outermost frame: everything becomes an answer and a log line
            frames = "".join(traceback.format_tb(error.__traceback__))  # no message: it may quote a prompt
            log.error("%s: unexpected %s\n%s", scope.get("coserve.request_id"), type(error).__name__, frames)
            if not begun:
                await internal_error().response()(scope, receive, send)


class _PlainError:
    """An error that the framework answers in plain text, as for a bad `Range`: kept back until its text is whole."""

    def __init__(self, status: int, headers: Headers) -> None:
        self._status = status
        self._headers = headers
        self._text = b""

    @classmethod
    def of(cls, start: Message) -> _PlainError | None:
        headers = Headers(raw=start["headers"])
        told = headers.get("content-type", "").startswith("text/")
        return cls(start["status"], headers) if start["status"] >= 400 and told else None

    def complete(self, message: Message) -> bool:
        self._text += message.get("body", b"")
        return not message.get("more_body")

    def error(self) -> ApiError:
        kept = {name: self._headers[name] for name in ("allow", "content-range") if name in self._headers}
        return from_status(self._status, clip(self._text.decode("utf-8", "replace"), 500), kept)


class Limits:
    """431 for headers and 413 for a body over their limits, however the body is sent; 415 for a packed one."""

    def __init__(self, app: ASGIApp, max_header: int, max_body: int, larger: Mapping[str, int]) -> None:
        self.app = app
        self.max_header = max_header
        self.max_body = max_body
        self.larger = larger  # path -> limit, for the routes that take files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("query_string", b""))
        if size > self.max_header:
            error = ApiError(431, f"The request's headers take {size} bytes; at most {self.max_header} are allowed.")
            return await error.response()(scope, receive, send)

        coding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            error = ApiError(415, f"A body with content-encoding '{clip(coding, 40)}' is not read: send it as it is.")
            return await error.response()(scope, receive, send)
        limit = self.larger.get(scope["path"], self.max_body)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            await _discard(receive)
            return await _too_large(limit).response()(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    await _discard(receive)
                    raise _too_large(limit)
            return message

        return await self.app(scope, counted, send)


def new_request_id() -> str:
    return f"req_{secrets.token_hex(16)}"


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", headers={"connection": "close"})


async def _discard(receive: Receive) -> None:
    """Read on for a moment: a client that still writes would otherwise see a reset instead of the answer."""
    left = _DISCARD_BYTES
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return


def _printable(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path[:200])
