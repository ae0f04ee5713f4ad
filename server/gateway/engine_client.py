"""The gateway's side of the engine: one connection that is always being kept, and what runs over it.

Tokens are fanned out to one queue a sequence, calls are matched with their answers, everything else goes to
subscribers. The engine may vanish at any moment: sequences that had not started are sent again to the next
engine, twice at most, started ones end with `engine_restarted`. Belongs to one event loop; never blocks it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from coserve.server.gateway.engine_sequence import EngineSequence
from coserve.server.gateway.waiting import Waiting, waiting
from coserve.server.wire.codec import WireError
from coserve.server.wire.messages import (
    Abort,
    AdapterChecked,
    AdapterDropped,
    AdapterRef,
    AdaptersPinned,
    CheckAdapter,
    DropAdapter,
    EngineReady,
    Failed,
    Generate,
    GetIterations,
    Iterations,
    PinAdapters,
    Stats,
    Tokens,
)
from coserve.server.wire.stream import MessageStream

log = logging.getLogger("coserve.engine_client")

M = TypeVar("M")
_RESUBMISSIONS = 2  # of one sequence: it may be what ends the engines
_BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


class EngineUnavailable(Exception):
    """There is no engine to ask, or it did not answer in time."""


class EngineClient:
    """Keeps one connection to the engine at `socket_path`, for ever, and multiplexes everything over it."""

    def __init__(
        self,
        socket_path: str,
        *,
        silence_seconds: float = 20.0,
        patience_seconds: float = 10.0,
        give_up_seconds: float = 300.0,
        accept: Callable[[EngineReady], None] | None = None,
    ) -> None:
        """`accept` is called in a thread, before any work is sent, for each engine whose base model is another than
        the last one's; what it raises ends the client.
        """
        self._accept = accept
        self._socket_path = socket_path
        self._silence_seconds = silence_seconds
        self._patience_seconds = patience_seconds
        self._give_up_seconds = give_up_seconds
        self._stream: MessageStream | None = None
        self._task: asyncio.Task[None] | None = None
        self._sequences: dict[str, EngineSequence] = {}  # by wire id
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._subscribers: dict[type, list[Callable[[Any], None]]] = {}
        self._became_ready = asyncio.Event()
        self._lost_at = time.monotonic()
        self._heard_at = 0.0
        self.engine: EngineReady | None = None  # what the connected engine said of itself; None while there is none
        self.known: EngineReady | None = None  # the same of the latest engine, also after it went away
        self.stats: Stats | None = None

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Begins connecting in the background; returns at once."""
        self._task = asyncio.create_task(self._run(), name="engine-client")

    async def until_refused(self) -> None:
        """Waits for ever, unless an engine comes that must not be used: then raises what `accept` has raised."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Ends the connection; sequences that still run fail with `engine_unavailable`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for sequence in list(self._sequences.values()):
            sequence.fail("engine_unavailable", "The server is shutting down.")
        self._sequences.clear()

    @property
    def ready(self) -> bool:
        """Connected to an engine that takes work and has been heard of lately."""
        return self.engine is not None and time.monotonic() - self._heard_at <= self._silence_seconds

    @property
    def away_seconds(self) -> float:
        """How long there has been no usable engine; 0 while there is one."""
        if self.engine is None:
            return time.monotonic() - self._lost_at
        silent = time.monotonic() - self._heard_at
        return silent if silent > self._silence_seconds else 0.0

    @property
    def accepts_work(self) -> bool:
        """Whether a request sent now will reach an engine soon: one is there, or was a moment ago."""
        return self.away_seconds == 0.0 or (self.known is not None and self.away_seconds <= self._patience_seconds)

    async def wait_ready(self, timeout: float) -> EngineReady:
        """The connected engine. Raises EngineUnavailable after `timeout` seconds without one."""
        try:
            async with asyncio.timeout(timeout):
                await self._became_ready.wait()
        except TimeoutError:
            raise EngineUnavailable("the engine is not up") from None
        if self.engine is None:
            raise EngineUnavailable("the engine went away")
        return self.engine

    def subscribe(self, kind: type[M], callback: Callable[[M], None]) -> None:
        """Calls back for every message of one type (EngineReady, JobEvent, Stats, Drained). Must not block or raise."""
        self._subscribers.setdefault(kind, []).append(callback)

    # ------------------------------------------------------------------ sequences

    def generate(self, message: Generate, news: asyncio.Event) -> EngineSequence:
        """Starts a sequence, which sets `news` whenever there is something to take; waits for an engine if need be."""
        sequence = EngineSequence(message, news, self._forget)
        self._sequences[sequence.wire_id] = sequence
        if self.engine is not None:
            self._post(replace(message, request_id=sequence.wire_id))
        return sequence

    @property
    def waiting(self) -> int:
        """Sequences that have no token yet."""
        return sum(not sequence.started for sequence in self._sequences.values())

    def queue(self, tenant: str) -> list[Waiting]:
        """The tenant's sequences that have no token yet, the next one first, as of the engine's last report."""
        return waiting(self._sequences.values(), self.stats if self.engine is not None else None, tenant)

    @property
    def running(self) -> int:
        return sum(sequence.started for sequence in self._sequences.values())

    def _forget(self, sequence: EngineSequence) -> None:
        if self._sequences.pop(sequence.wire_id, None) is not None and not sequence.finished:
            sequence.finished = True
            if self.engine is not None:
                self._post(Abort(sequence.wire_id))

    # ------------------------------------------------------------------ calls

    async def check_adapter(self, path: str, timeout: float = 60.0) -> AdapterChecked:
        """Asks the engine to read the PEFT folder at `path` (relative to the data directory)."""
        return await self._call(lambda call_id: CheckAdapter(call_id, path), timeout)

    async def drop_adapter(self, digest: str, timeout: float = 600.0) -> AdapterDropped:
        """Returns once no request uses the version any more: its files may go."""
        return await self._call(lambda call_id: DropAdapter(call_id, digest), timeout)

    async def pin_adapters(self, versions: tuple[AdapterRef, ...], timeout: float = 30.0) -> AdaptersPinned:
        """These versions, and no others, are to stay resident; returns once each is, or is refused."""
        return await self._call(lambda call_id: PinAdapters(call_id, versions), timeout)

    async def get_iterations(self, limit: int, timeout: float = 10.0) -> Iterations:
        return await self._call(lambda call_id: GetIterations(call_id, limit), timeout)

    async def _call(self, make: Callable[[int], Any], timeout: float) -> Any:
        if self.engine is None:
            raise EngineUnavailable("the engine is not up")
        call_id = next(self._call_ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            self._post(make(call_id))
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise EngineUnavailable("the engine did not answer in time") from None
        finally:
            self._calls.pop(call_id, None)

    async def send(self, message: Any) -> None:
        """Sends StartJob, StopJob or Drain. Raises EngineUnavailable; what must happen is sent again on EngineReady."""
        if self.engine is None or self._stream is None:
            raise EngineUnavailable("the engine is not up")
        try:
            await self._stream.send(message)
        except ConnectionError as error:
            raise EngineUnavailable("the engine went away") from error

    # ------------------------------------------------------------------ the connection

    def _post(self, message: Any) -> None:
        if self._stream is None:
            return
        try:
            self._stream.post(message)
        except ConnectionError:
            log.debug("not sent, the connection is closing: %s", type(message).__name__)

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                stream = await MessageStream.open_unix(self._socket_path)
            except OSError:
                self._give_up_waiting()
                await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
                failures += 1
                continue
            failures = 0
            self._stream = stream
            try:
                while True:
                    message = await stream.receive()
                    if isinstance(message, EngineReady):
                        await self._check(message)
                    self._handle(message)
            except (ConnectionError, OSError) as error:
                log.warning("the connection to the engine ended: %s", error)
            except WireError as error:
                log.error("the engine sent a broken message: %s", error)
            finally:
                self._lost()
                await stream.close()
            await asyncio.sleep(_BACKOFF_SECONDS[0])

    def _handle(self, message: Any) -> None:
        self._heard_at = time.monotonic()
        match message:
            case Tokens():
                sequence = self._sequences.get(message.request_id)
                if sequence is not None and not sequence.finished:
                    sequence.deliver(message)
            case Failed():
                sequence = self._sequences.get(message.request_id)
                if sequence is not None and not sequence.finished:
                    sequence.fail(message.code, message.message)
            case AdapterChecked() | AdapterDropped() | AdaptersPinned() | Iterations():
                answer = self._calls.get(message.call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case EngineReady():
                self._adopt(message)
            case Stats():
                self.stats = message
        for callback in self._subscribers.get(type(message), ()):
            try:
                callback(message)
            except Exception:  # a subscriber's bug must not cut everybody's connection
                log.exception("a subscriber to %s failed", type(message).__name__)

    async def _check(self, engine: EngineReady) -> None:
        if self._accept is not None and (self.known is None or self.known.base_digest != engine.base_digest):
            await asyncio.to_thread(self._accept, engine)

    def _adopt(self, engine: EngineReady) -> None:
        """A new connection to an engine: clear what an earlier connection left there, send what has not started."""
        self.engine = self.known = engine
        self._became_ready.set()
        for request_id in engine.running_requests:
            if request_id not in self._sequences:
                self._post(Abort(request_id))
        for sequence in self._sequences.values():
            self._post(replace(sequence.message, request_id=sequence.wire_id))
        log.info("connected to engine %d on %s, %d requests sent", engine.pid, engine.device, len(self._sequences))

    def _give_up_waiting(self) -> None:
        """Sequences kept for the next engine wait neither for ever nor past their deadline."""
        now, given_up = time.monotonic(), self.away_seconds > self._give_up_seconds
        for sequence in self._sequences.values():
            sequence.expire(now)
            if given_up and not sequence.finished:
                sequence.fail("engine_unavailable", "The engine did not come back in time; try again later.")

    def _lost(self) -> None:
        """The connection is gone, and with it every sequence that had begun."""
        self._stream = None
        had_them = self.engine is not None  # sequences are sent as soon as an engine says that it is ready
        if had_them:
            self._lost_at = time.monotonic()
        self.engine = None
        self._became_ready.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineUnavailable("the engine went away before it answered"))
        survivors: dict[str, EngineSequence] = {}
        for sequence in self._sequences.values():
            if sequence.finished:
                continue
            if sequence.started:
                sequence.fail("engine_restarted", "The engine restarted while this request was running; send it again.")
            elif had_them and sequence.attempt == _RESUBMISSIONS:
                log.error("the engine was lost %d times while it had %s", _RESUBMISSIONS + 1, sequence.wire_id)
                sequence.fail("engine_crashed", "The engine was lost each time that it had this request.")
            else:
                sequence.attempt += had_them
                survivors[sequence.wire_id] = sequence
        self._sequences = survivors
