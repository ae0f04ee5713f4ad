"""A gateway on a real TCP port in front of a scripted engine: for what a client's connection does. For tests only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from scripted_engine import World

from coserve.server.api.connection import limited
from coserve.server.app import create_app
from coserve.server.wire.messages import Abort, Generate, Tokens


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield


@asynccontextmanager
async def listening(world: World, **limits: Any) -> AsyncIterator[int]:
    """The port of the world's application, served as the gateway process serves it."""
    settings = world.services.settings
    values = {
        "stream_buffer": settings.stream_buffer, "stall_seconds": settings.stream_stall_seconds,
        "max_connections": 1000, **limits,
    }  # fmt: skip
    config = uvicorn.Config(
        create_app(world.services), http=limited(**values), ws="none", lifespan="off", log_config=None, port=0,
        access_log=False, proxy_headers=False, h11_max_incomplete_event_size=settings.max_header * 2,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    listener = server.servers[0].sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)  # accepted sockets have it too
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


class RawClient:
    """One connection and one request, written and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, limit: int = 2**16) -> RawClient:
        """A connection that the kernel buffers little of, so that a test need not send megabytes to fill it."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=limit))

    def post(self, world: World, path: str, body: dict, key: str | None = None) -> None:
        payload = json.dumps(body).encode()
        key = key or world.a.headers["authorization"]
        self.writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(payload)}\r\n\r\n".encode()
            + payload
        )

    async def events(self) -> AsyncIterator[Any]:
        """Data of a stream's events, "[DONE]" as text, comments as None; ends with the response."""
        while True:
            line = (await self.reader.readline()).strip()
            if line == b"data: [DONE]":
                yield "[DONE]"
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
            elif line.startswith(b":"):
                yield None
            elif line == b"0" or self.reader.at_eof():
                return

    async def head(self) -> str:
        return (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")

    def close(self) -> None:
        self.writer.transport.abort()


def requests(world: World) -> list[Generate]:
    return world.engine.of(Generate)


def aborted(world: World) -> list[str]:
    return [message.request_id for message in world.engine.of(Abort)]


async def first_request(world: World, count: int = 1) -> Generate:
    """Wait until the engine was sent that many sequences; the last of them."""
    await world.until(lambda: len(requests(world)) >= count)
    return requests(world)[count - 1]


def give(world: World, request: Generate, *ids: int, finish: str | None = None, **fields: Any) -> None:
    """The engine answers with tokens."""
    world.engine.push(Tokens(request.request_id, ids, finish, fields.pop("cached", 0), **fields))
