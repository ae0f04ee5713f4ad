"""The HTTP connection: uvicorn's, with JSON for malformed requests, a bound on connections, and an end to slow readers.

A client that leaves more than a buffer's worth unread for too long loses its connection; the others notice nothing.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from coserve.server.api.errors import ApiError, invalid, unavailable
from coserve.server.api.middleware import new_request_id


class GatewayProtocol(H11Protocol):
    """Made once a connection by uvicorn. The limits are class attributes: see `limited`."""

    stream_buffer = 256 * 1024
    stall_seconds = 30.0
    first_request_seconds = 60.0
    max_connections = 4096

    _stalled: asyncio.TimerHandle | None = None
    _idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Low close to high: a reader must take a quarter of the buffer within the time, not all of it.
        transport.set_write_buffer_limits(high=self.stream_buffer, low=self.stream_buffer * 3 // 4)
        if len(self.connections) > self.max_connections:
            self._refuse(unavailable("The server has too many connections; try again in a moment.", 1000))
            return
        self._idle = self.loop.call_later(self.first_request_seconds, self._give_up_waiting)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(invalid("The request is not valid HTTP.", code="invalid_http"))

    def _give_up_waiting(self) -> None:
        """A connection that never completes its first request's headers is closed."""
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        reason = {400: "Bad Request", 503: "Service Unavailable"}[error.status]
        lines = [
            f"HTTP/1.1 {error.status} {reason}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {new_request_id()}",
            *(f"{name}: {value}" for name, value in (error.headers or {}).items()),
            "connection: close",
        ]
        self.transport.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
        self.conn.send_failed()
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.conn.our_state is h11.ERROR or self.transport.is_closing():
            return
        super().data_received(data)

    def _cancel_timers(self) -> None:
        for timer in (self._stalled, self._idle):
            if timer is not None:
                timer.cancel()


def limited(*, stream_buffer: int, stall_seconds: float, max_connections: int) -> type[GatewayProtocol]:
    """The protocol with these limits, as a class for uvicorn's configuration."""
    limits: dict[str, Any] = {
        "stream_buffer": stream_buffer, "stall_seconds": stall_seconds, "max_connections": max_connections
    }  # fmt: skip
    return type("LimitedGatewayProtocol", (GatewayProtocol,), limits)
