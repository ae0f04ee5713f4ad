"""What comes in between two iterations: messages of the gateway, finished side work, adapters that have arrived."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from coserve.server.engine.adapters import AdapterBook
from coserve.server.engine.checking import FolderCheck
from coserve.server.engine.containment import attempt
from coserve.server.engine.iterations import IterationLog
from coserve.server.engine.requests import Request, RequestBook
from coserve.server.engine.shares import Shares
from coserve.server.engine.trainer import Trainer
from coserve.server.wire.messages import (
    Abort,
    AdapterDropped,
    CheckAdapter,
    Drain,
    Drained,
    DropAdapter,
    EngineReady,
    Failed,
    Generate,
    GetIterations,
    Iterations,
    PinAdapters,
    StartJob,
    StopJob,
    TenantShare,
)  # fmt: skip
from coserve.server.wire.sync import Connected, Disconnected, EngineSocket

log = logging.getLogger("coserve.engine")

_AHEAD = 2  # blocks a running request that no load of an adapter takes: it would be preempted for the next ones


class Intake:
    """Applies messages to the books. Never blocks."""

    def __init__(
        self, socket: EngineSocket, ready: Callable[[], EngineReady], requests: RequestBook, adapters: AdapterBook,
        trainer: Trainer, checks: FolderCheck, iterations: IterationLog, max_model_len: int, shares: Shares,
    ) -> None:  # fmt: skip
        self._shares = shares
        self._socket, self._ready = socket, ready
        self._requests, self._adapters, self._trainer = requests, adapters, trainer
        self._checks, self._iterations = checks, iterations
        self._max_model_len = max_model_len
        self._drain_until: float | None = None
        self._dropping: dict[int, str] = {}  # call id -> digest whose last request is still running
        self.drained = False
        self._handlers: dict[type, Callable[[Any], None]] = {
            Connected: self._connected, Disconnected: self._disconnected, Generate: self._generate,
            Abort: self._abort, StartJob: self._start_job, StopJob: self._stop_job, CheckAdapter: self._checks.start,
            DropAdapter: self._drop_adapter, PinAdapters: self._pin_adapters,
            GetIterations: self._get_iterations, Drain: self._drain,
        }  # fmt: skip

    def take(self) -> None:
        for message in self._socket.poll():
            self._handlers[type(message)](message)
        self._adapters.pool.room.left_free = _AHEAD * self._requests.running
        self._trainer.tick()
        for event in self._trainer.events():
            self._socket.send(event)
        for reply in (*self._checks.finished(), *self._adapters.pins.answers()):
            self._socket.send(reply)
        self._confirm_drops()
        if self._drain_until is not None and (not len(self._requests) or time.monotonic() > self._drain_until):
            self._finish_drain()

    def finish(self, request: Request) -> None:
        """A sequence has ended, in whatever way: everything it holds is given back."""
        self._release_adapter(request)
        self._requests.remove(request)

    def preempt(self, request: Request) -> None:
        """A sequence waits again: its blocks go to others, and so may its adapter's place until it is admitted anew."""
        self._release_adapter(request)
        self._requests.preempt(request)

    def _release_adapter(self, request: Request) -> None:
        if request.acquired and request.message.adapter is not None:
            self._adapters.release(request.message.adapter)
            request.acquired = False

    def load_adapters(self, digests: Iterable[str]) -> None:
        """Move adapter loads along, for the versions the scheduler wants resident, most urgent first."""
        known = {r.version: r.message.adapter for r in self._requests if r.message.adapter is not None}
        wanted = [known[digest] for digest in digests if digest in known]
        for digest, fault in self._adapters.tick(wanted).items():
            for request in [r for r in self._requests if r.version == digest]:
                self.finish(request)
                self._socket.send(Failed(request.id, fault.code, fault.message))

    # ------------------------------------------------------------------ messages

    def _connected(self, _: Connected) -> None:
        self._abort_all()
        self._socket.send(self._ready())

    def _disconnected(self, message: Disconnected) -> None:
        log.info("the gateway is gone: %s", message.reason)
        self._abort_all()

    def _abort_all(self) -> None:
        """Requests belong to a connection; jobs go on without one."""
        for request in list(self._requests):
            self.finish(request)
        self._dropping.clear()

    def _generate(self, message: Generate) -> None:
        if self._drain_until is not None:
            self._socket.send(Failed(message.request_id, "draining", "the server is shutting down"))
        elif not message.prompt_ids or len(message.prompt_ids) + message.sampling.max_tokens > self._max_model_len:
            self._socket.send(
                Failed(
                    message.request_id, "context_length_exceeded",
                    f"{len(message.prompt_ids)} prompt tokens and max_tokens {message.sampling.max_tokens} do not fit "
                    f"the context of {self._max_model_len} tokens",
                )
            )  # fmt: skip
        else:
            self._note(message.tenant, message.share)
            fault = attempt(f"request {message.request_id}", lambda: self._requests.add(message))
            if fault is not None:
                self._socket.send(Failed(message.request_id, fault.code, fault.message))

    def _note(self, tenant: str, share: TenantShare) -> None:
        self._shares.note(tenant, share)
        self._requests.blocks.prefix_cache.limit(tenant, self._shares.cached_blocks(tenant))

    def _abort(self, message: Abort) -> None:
        request = self._requests.get(message.request_id)
        if request is not None:
            self.finish(request)

    def _start_job(self, message: StartJob) -> None:
        if self._drain_until is None:
            self._note(message.tenant, message.share)
            self._trainer.start(message.job_id)

    def _stop_job(self, message: StopJob) -> None:
        self._trainer.stop(message.job_id, pause=message.pause)

    def _drop_adapter(self, message: DropAdapter) -> None:
        self._dropping[message.call_id] = message.digest

    def _pin_adapters(self, message: PinAdapters) -> None:
        self._adapters.pins.replace(message.call_id, message.versions)

    def _confirm_drops(self) -> None:
        for call_id, digest in list(self._dropping.items()):
            if not any(r.version == digest for r in self._requests):
                self._adapters.drop(digest)
                self._requests.blocks.prefix_cache.clear(digest)
                del self._dropping[call_id]
                self._socket.send(AdapterDropped(call_id))

    def _get_iterations(self, message: GetIterations) -> None:
        self._socket.send(Iterations(message.call_id, self._iterations.latest(message.limit)))

    def _drain(self, message: Drain) -> None:
        if self._drain_until is None:
            self._drain_until = time.monotonic() + message.grace_seconds

    def begin_drain(self, grace_seconds: float) -> None:
        """The same from a signal."""
        self._drain(Drain(grace_seconds))

    def _finish_drain(self) -> None:
        self._abort_all()
        self._trainer.close()
        self._adapters.close()
        for event in self._trainer.events():
            self._socket.send(event)
        self._socket.send(Drained())
        self.drained = True
