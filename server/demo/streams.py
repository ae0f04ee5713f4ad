"""Tenant A: a few readers who keep asking for text and note when each piece of it arrives."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

from coserve.server.demo.client import CallFailed, Client
from coserve.server.demo.meter import Gaps

PROMPTS = (
    "The lighthouse keeper had not spoken to anyone since",
    "A short history of the bicycle begins with",
    "To keep bees through a long winter, you first",
    "The train stopped in the middle of a field, and",
    "What makes a good cup of tea is",
    "Deep under the harbour there is a tunnel that",
    "My grandmother's advice about money was",
    "The night sky over the desert looks",
    "When the orchestra had packed up, the cleaner",
    "Glass is made by heating sand until",
    "In the third week at sea the cook",
    "The trouble with owning a parrot is",
)


class Streams:
    """`count` readers, each with one stream at a time and a new one as soon as that ends.

    `gaps` takes the seconds between a stream's pieces; `failures` what went wrong; `finished` counts whole streams.
    """

    def __init__(self, client: Client, model: str, count: int, *, max_tokens: int = 96):
        self._client, self._model, self._max_tokens = client, model, max_tokens
        self._prompts = itertools.cycle(enumerate(PROMPTS))
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []
        self.gaps = Gaps()
        self.failures: list[str] = []
        self.finished = 0
        self.latest = ""  # the last words of the stream that spoke last

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._read_on()) for _ in range(self._count)]

    async def stop(self) -> None:
        """Hang up in the middle, as readers do. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def seconds_since_last_piece(self, now: float) -> float:
        return self.gaps.seconds_since_last(now)

    async def _read_on(self) -> None:
        while True:
            number, prompt = next(self._prompts)
            try:
                await self._read(prompt, seed=number, clock=time.monotonic)
                self.finished += 1
            except CallFailed as error:
                self.failures.append(str(error))
                await asyncio.sleep(1.0)

    async def _read(self, prompt: str, *, seed: int, clock: Callable[[], float]) -> None:
        last: float | None = None
        text = prompt
        pieces = self._client.stream(
            model=self._model, prompt=prompt, max_tokens=self._max_tokens, temperature=0.8, seed=seed, ignore_eos=True
        )
        async for piece in pieces:
            now = clock()
            self.gaps.add(now, None if last is None else now - last)
            last, text = now, text + piece
            self.latest = text[-60:].replace("\n", " ")
