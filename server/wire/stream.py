"""The gateway's end of the socket: one asyncio connection that sends and receives whole messages.

It knows frames, not meanings: reconnecting, and what a lost connection does to requests, is its user's business.
"""

from __future__ import annotations

import asyncio
from typing import Any

from coserve.server.wire.codec import HEADER_BYTES, decode, encode, frame_length

_READ_AHEAD = 1 << 20


class MessageStream:
    """One connection. `receive` belongs to one task; `send` and `post` may be called from any task of the loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open_unix(cls, path: str) -> MessageStream:
        """Connects to the engine's socket. Raises OSError while the engine does not listen."""
        reader, writer = await asyncio.open_unix_connection(path, limit=_READ_AHEAD)
        return cls(reader, writer)

    async def send(self, message: Any) -> None:
        """Sends one message and waits while the engine is behind. Raises ConnectionError once the engine is gone."""
        self.post(message)
        await self._writer.drain()

    def post(self, message: Any) -> None:
        """Queues one message without waiting: for the few that must leave also while a task is being cancelled."""
        frame = encode(message)
        if self._writer.is_closing():
            raise ConnectionResetError("the connection to the engine is closed")
        self._writer.write(frame)

    async def receive(self) -> Any:
        """The next message. Raises ConnectionError at the end of the connection, WireError on a broken frame."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            payload = await self._reader.readexactly(frame_length(header))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the engine closed the connection") from error
        return decode(payload)

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # the other end was gone already: closed is closed
