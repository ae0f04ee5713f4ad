"""An engine on a test stand: put together by the product's own code, turned in this process, spoken to by its socket.

Only the gateway is missing: this module says what a gateway would say, over the same messages. It never reaches into
the engine; what it knows of it comes from its answers, its event files and the allocator.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coserve.server.engine.load import LoadedModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.start import build_engine
from coserve.server.training.events import read_events
from coserve.server.training.fault import OUT_OF_MEMORY, is_out_of_memory
from coserve.server.wire.codec import HEADER_BYTES, decode, encode, frame_length
from coserve.server.wire.lifeline import Heartbeat
from coserve.server.wire.messages import (
    Abort,
    AdapterRef,
    Drain,
    EngineReady,
    Failed,
    Generate,
    GetIterations,
    Iterations,
    JobEvent,
    SamplingParams,
    StartJob,
    Stats,
    StopJob,
    Tokens,
)  # fmt: skip

_IDLE_SECONDS = 0.0002  # between two looks of an engine that had nothing to run
_LONGEST_SECONDS = 300.0  # nothing on the stand takes longer


def failure(what: str, code: str, message: str) -> Exception:
    """Of a request or a job; MemoryError where memory ran out."""
    kind = MemoryError if code == OUT_OF_MEMORY else RuntimeError
    return kind(f"{what} failed: {code}: {message}")


class Stand:
    """Context manager. `options` are the engine's; `policy` plans in the scheduler's place."""

    def __init__(self, model: LoadedModel, *, policy: Any = None, **options: Any) -> None:
        self.model = model
        self._folder = tempfile.TemporaryDirectory(prefix="cs-")  # short: a socket's path has little room
        self.data_dir = Path(self._folder.name) / "data"
        self.data_dir.mkdir()
        self.socket_path = str(Path(self._folder.name) / "e.sock")
        base = model.base
        values = {"device": str(base.device), "dtype": str(base.dtype).removeprefix("torch."), **options}
        chosen = EngineOptions(model="base", data_dir=self.data_dir, socket_path=self.socket_path, **values)
        more = {} if policy is None else {"policy": policy}
        loaded = replace(model, max_model_len=chosen.max_model_len or model.max_model_len)
        self.engine, self.intake = build_engine(chosen, Heartbeat(None), lambda _: loaded, **more)
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._calls = 0
        self.tokens: Counter[str] = Counter()  # by request
        self.texts: dict[str, list[int]] = {}
        self.steps: Counter[str] = Counter()  # by job, as far as they were told to this connection
        self.gauges: dict[str, float] = {}
        self._rounds = 0  # of prompts
        self._answered: set[int] = set()
        self._ready: EngineReady | None = None
        self.connect()

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        self.close(drain=failure is None or is_out_of_memory(failure))

    def close(self, *, drain: bool = True) -> None:
        """The model stays, everything else of the engine goes. An engine that has failed is not drained; one whose
        memory ran out has not failed, and its threads would keep what it held."""
        if drain:
            self.connect()
            self.send(Drain(0.0))
            self.engine.run()
        if self._socket is not None:
            self._socket.close()
        del self.engine, self.intake
        self._folder.cleanup()

    @property
    def ready(self) -> EngineReady:
        if self._ready is None:
            raise RuntimeError("the engine has not said that it is ready")
        return self._ready

    # ------------------------------------------------------------------ the conversation

    def connect(self) -> None:
        """Anew: the engine drops whoever was connected, and their requests."""
        if self._socket is not None:
            self._socket.close()
        self._received.clear()
        self._ready = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(self.socket_path)
        self._socket.setblocking(False)
        self.until(lambda: self._ready is not None)

    def send(self, message: Any) -> None:
        if self._socket is None:
            raise RuntimeError("nobody is connected")
        self._socket.setblocking(True)
        self._socket.sendall(encode(message))
        self._socket.setblocking(False)

    def step(self) -> bool:
        """One iteration, and what it said taken off the socket; False if there was nothing to run.

        Then it sleeps a moment, as the engine's own loop does: spinning would keep Python from its other threads.
        """
        ran = self.engine.step()
        if not ran:
            time.sleep(_IDLE_SECONDS)
        try:
            while self._socket is not None and (chunk := self._socket.recv(1 << 20)):
                self._received += chunk
        except BlockingIOError:
            pass
        return ran

    def until(self, condition: Callable[[], bool], limit: float = _LONGEST_SECONDS) -> None:
        """Turns the engine until the condition holds. Raises TimeoutError, and `failure` of a request or a job."""
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"what the stand waits for did not happen within {limit:.0f} s")
            self.step()
            self.file()

    def file(self) -> None:
        """Take in what was received since the last call."""
        for message in self._messages():
            if isinstance(message, Tokens):
                self.tokens[message.request_id] += len(message.token_ids)
                self.texts.setdefault(message.request_id, []).extend(message.token_ids)
            elif isinstance(message, Failed):
                raise failure(f"request {message.request_id}", message.code, message.message)
            elif isinstance(message, JobEvent):
                if message.record["kind"] == "failed":
                    raise failure(f"job {message.job_id}", message.record["data"]["code"], message.record["message"])
                self.steps[message.job_id] += message.record["kind"] == "step"
            elif isinstance(message, Stats):
                self.gauges = message.gauges
            elif isinstance(message, Iterations):
                self._answered.add(message.call_id)
            elif isinstance(message, EngineReady):
                self._ready = message

    def settle(self) -> None:
        """Until the engine has taken all that was sent."""
        self._calls += 1
        self.send(GetIterations(self._calls, 0))
        self.until(lambda: self._calls in self._answered)

    def _messages(self) -> Iterator[Any]:
        start, end = 0, len(self._received)
        while end - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            length = frame_length(self._received[start:body])
            if end - body < length:
                break
            yield decode(bytes(self._received[body : body + length]))
            start = body + length
        del self._received[:start]

    # ------------------------------------------------------------------ requests and jobs

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, adapters: Sequence[AdapterRef | None] = ()
    ) -> list[str]:
        """Greedy requests that nothing ends early; their ids."""
        ids = []
        for number, prompt in enumerate(prompts):
            self._calls += 1
            ids.append(f"r{self._calls}")
            adapter = adapters[number] if adapters else None
            params = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0)
            self.send(Generate(ids[-1], "bench", tuple(prompt), params, adapter, "bench", time.monotonic()))
        return ids

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ones that this engine has not seen, and no two alike, so that no prefix is shared."""
        self._rounds += 1
        generator = torch.Generator().manual_seed(self._rounds)
        return torch.randint(3, self.model.base.vocab_size, (count, length), generator=generator).tolist()

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.send(Abort(request_id))
        self.settle()

    def start_job(self, job_id: str) -> None:
        self.send(StartJob(job_id, "bench"))

    def cancel_job(self, job_id: str) -> None:
        self.send(StopJob(job_id, pause=False))
        self.until(lambda: bool(self.events(job_id, "cancelled")))

    def events(self, job_id: str, *kinds: str) -> list[dict[str, Any]]:
        """Of those kinds, from the job's file."""
        file = self.data_dir / "jobs" / job_id / "events.jsonl"
        records = read_events(file) if file.exists() else ()
        return [record for record in records if record["kind"] in kinds]
