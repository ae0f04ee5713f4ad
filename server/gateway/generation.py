"""One generation request from admission to its ledger row: its sequences in the engine, the pieces of text they give.

Assumes a validated request. Nothing here knows HTTP: routes read pieces and put them in their own shapes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from coserve.server.gateway.admission import Admission, Place
from coserve.server.gateway.choice import Choice, GenerationRequest, Piece
from coserve.server.gateway.engine_client import EngineClient
from coserve.server.gateway.engine_sequence import EngineSequence, SequenceFailed
from coserve.server.gateway.text import TextModel
from coserve.server.store.store import Store
from coserve.server.store.usage import Usage
from coserve.server.telemetry.metrics import Metrics
from coserve.server.wire.messages import Generate

log = logging.getLogger("coserve.generation")


class Generation:
    """A running request. Read `next` until `done`, then `finish`; `abandon` at any moment ends it in the engine."""

    def __init__(
        self,
        request: GenerationRequest,
        choices: Sequence[Choice],
        admission: Admission,
        place: Place,
        leave: ExitStack,
        arrived: float,
    ) -> None:
        self.request = request
        self.choices = tuple(choices)
        self.arrived = arrived
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.failure: str | None = None  # the code of the error that it ended with
        self._admission = admission
        self._place = place
        self._leave = leave
        self._news = asyncio.Event()
        self._waiting = {choice.index for choice in choices}
        self._sequences: dict[int, EngineSequence] = {}

    def send(self, start: Callable[[Generate, asyncio.Event], EngineSequence]) -> None:
        """Starts one sequence a choice."""
        request = self.request
        for choice in self.choices:
            prompt = request.prompts[choice.index // request.n]
            message = Generate(
                request_id=f"{request.id}/{choice.index}",
                tenant=request.tenant,
                prompt_ids=prompt,
                sampling=replace(request.sampling, choice=choice.index % request.n),
                adapter=request.adapter,
                salt=request.salt,
                arrived=self.arrived,
                slo_class=request.promise.slo_class,
                ttft_seconds=request.promise.ttft,
                itl_seconds=request.promise.itl,
                share=request.share,
                deadline=None if request.timeout is None else self.arrived + request.timeout,
            )
            self._sequences[choice.index] = start(message, self._news)

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    async def next(self, timeout: float) -> list[Piece]:
        """New pieces, at least one; an empty list after `timeout` seconds without any. Raises SequenceFailed."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self._news.clear()
                    pieces = self._collect()
                    if pieces:
                        return pieces
                    await self._news.wait()
        except TimeoutError:
            return []

    def _collect(self) -> list[Piece]:
        pieces: list[Piece] = []
        for choice in self.choices:
            if choice.done:
                continue
            sequence = self._sequences[choice.index]
            try:
                update = sequence.take()
            except SequenceFailed as failed:
                self.failure = failed.code
                raise
            if update is None:
                continue
            if choice.index in self._waiting:
                self._waiting.discard(choice.index)
                self._admission.started(self._place)
            self.last_token_at = time.monotonic()
            self.first_token_at = self.first_token_at or self.last_token_at
            piece = choice.accept(update)
            if piece is not None:
                pieces.append(piece)
            if choice.done:
                sequence.close()  # a stop string may have ended it while the engine still runs it
        return pieces

    def fail(self, code: str, message: str) -> None:
        """Ends it for its reader, who gets SequenceFailed."""
        for sequence in self._sequences.values():
            sequence.close()
            sequence.fail(code, message)

    def abandon(self) -> None:
        """Ends what still runs and gives the place in the queue back. Idempotent, never waits."""
        for sequence in self._sequences.values():
            sequence.close()
        self._leave.close()

    @property
    def usage(self) -> Usage:
        """Tokens so far. A prompt with n choices counts once, and so do the tokens it found in the cache; it runs for
        each choice, less what that choice found.
        """
        first_choices = [choice for choice in self.choices if choice.index % self.request.n == 0]
        return Usage(
            request_id=self.request.id,
            model=self.request.model,
            prompt_tokens=sum(len(prompt) for prompt in self.request.prompts),
            cached_tokens=sum(choice.cached_tokens for choice in first_choices),
            computed_tokens=sum(
                len(self.request.prompts[choice.index // self.request.n]) - choice.cached_tokens
                for choice in self.choices
                if choice.index not in self._waiting
            ),
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
        )


class GenerationService:
    """Starts generations and closes their books."""

    def __init__(
        self, engine: EngineClient, text: TextModel, store: Store, admission: Admission, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._text = text
        self._store = store
        self._metrics = metrics
        self._running: dict[str, Generation] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self.admission = admission

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, request: GenerationRequest, arrived: float) -> Generation:
        """Sends the request's sequences to the engine. Raises QueueFull, Unavailable."""
        sequences = len(request.prompts) * request.n
        choices = []
        for index in range(sequences):
            continues = request.prompts[index // request.n] if request.continues_prompt else ()
            choices.append(Choice(index, request, self._text.detokenizer(request.skip_special, continues)))
        leave = ExitStack()
        place = leave.enter_context(self.admission.enter(request.tenant, sequences))
        generation = Generation(request, choices, self.admission, place, leave, arrived)
        try:
            generation.send(self._engine.generate)
        except BaseException:
            generation.abandon()
            raise
        self._running[request.id] = generation
        return generation

    async def finish(self, generation: Generation) -> None:
        """Closes a generation and returns once its ledger row is on disk. Idempotent; also right after a failure."""
        generation.abandon()
        if self._running.pop(generation.request.id, None) is None:
            return
        self._metrics.finished(generation)
        write = asyncio.create_task(self._record(generation))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        await asyncio.shield(write)

    def drop(self, generation: Generation) -> None:
        """The same for a caller that may not wait: the row is written in the background."""
        generation.abandon()
        if self._running.pop(generation.request.id, None) is not None:
            self._metrics.finished(generation)
            write = asyncio.create_task(self._record(generation))
            self._writes.add(write)
            write.add_done_callback(self._writes.discard)

    async def keep_books(self, every_seconds: float = 2.0) -> None:
        """Writes what long requests have used so far, lest a kill loses it. Runs for ever."""
        while True:
            await asyncio.sleep(every_seconds)
            await asyncio.gather(*(self._record(one) for one in self._running.values() if one.first_token_at))

    async def drain(self, grace_seconds: float) -> None:
        """Waits until nothing runs, at most `grace_seconds`; then ends the rest, and writes what is left to write."""
        deadline = time.monotonic() + grace_seconds
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for generation in list(self._running.values()):
            generation.fail("draining", "The server is shutting down before this request could finish.")
            self.drop(generation)
        await asyncio.gather(*self._writes, return_exceptions=True)

    async def _record(self, generation: Generation) -> None:
        try:
            await self._store.usage.record(generation.request.tenant, generation.usage)
        except Exception:
            # the answer is right and may still be sent; only the books miss a row, and the operator must know
            log.exception("the ledger row of %s could not be written", generation.request.id)
