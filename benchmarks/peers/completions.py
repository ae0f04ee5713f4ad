"""A client of `/v1/completions` in a few lines of asyncio: on a small machine the client shares the cores with the
server, and a full HTTP client would take a noticeable part of them.

It knows token ids alone, and asks for greedy completions of exactly so many tokens. Standard library only: a peer's
worker uses it in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass


class CompletionFailed(RuntimeError):
    """The server refused a completion or broke it off."""


@dataclass(frozen=True)
class Completions:
    """A server on this machine, and the model asked of it."""

    port: int
    model: str
    key: str = "none"

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[tuple[float, int]]:
        """(arrival time, tokens) of every piece of one completion."""
        body = json.dumps(
            {"model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
             "stream": True, "return_token_ids": True}
        ).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            writer.write(head + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise CompletionFailed(f"a completion was refused: {(await reader.read()).decode(errors='replace')}")
            got = 0
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    raise CompletionFailed(f"a stream failed: {piece['error']}")
                count = len(piece["choices"][0]["token_ids"]) if piece["choices"] else 0
                if count:
                    got += count
                    yield time.perf_counter(), count
            if got != new_tokens:
                raise CompletionFailed(f"a stream brought {got} of {new_tokens} tokens")
        finally:
            writer.close()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds from the first request to the last token of all, sent at once."""

        async def one(prompt: list[int]) -> None:
            async for _ in self.stream(prompt, new_tokens):
                pass

        async def every() -> None:
            await asyncio.gather(*(one(prompt) for prompt in prompts))

        began = time.perf_counter()
        asyncio.run(every())
        return time.perf_counter() - began
