"""Server-sent events as an ASGI response: data lines, comments as heartbeats, and never an `id:` field.

How long a client may leave its stream unread is the connection's business; what runs behind it ends with it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coserve.server.gateway.disconnects import ClientGone, while_connected

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


def comment(text: str) -> bytes:
    """A heartbeat that says something: clients skip it."""
    return b": " + text.replace("\n", " ").encode("utf-8", "replace") + b"\n\n"


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # made once: half the cost


def event(data: Mapping[str, Any]) -> bytes:
    """One event whose data is a JSON object on one line. Raises ValueError for NaN and infinity."""
    return b"data: " + _JSON.encode(data).encode("utf-8", "replace") + b"\n\n"


class EventStream(Response):
    """Sends what `chunks` yields, each at once. `closed` is called when it is over, however it came to that."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        closed: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientGone:
            return
        finally:
            self._closed()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
