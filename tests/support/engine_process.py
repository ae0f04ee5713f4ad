"""A real engine process on a tiny model, spoken to over its real socket. For tests only."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coserve.server.wire.codec import HEADER_BYTES, decode, encode, frame_length
from coserve.server.wire.messages import (
    EngineReady,
    Failed,
    Generate,
    GetIterations,
    Iterations,
    JobEvent,
    SamplingParams,
    StartJob,
    Tokens,
)  # fmt: skip

READY_SECONDS = 150
AHEAD = {"plan_ahead": True} if os.environ.get("COSERVE_TEST_PLAN_AHEAD") == "1" else {}  # as on a GPU


class EngineProcess:
    """Context manager. `settings` are those of the supervisor's settings file; `environment` is added to ours."""

    def __init__(
        self, model: Path, data_dir: Path, *, environment: dict[str, str] | None = None, **settings: Any
    ) -> None:
        self.data_dir = data_dir
        self._environment = environment or {}
        data_dir.mkdir(parents=True, exist_ok=True)
        self._run = tempfile.TemporaryDirectory(prefix="cs-")
        folder = Path(self._run.name)
        self._socket_path = str(folder / "e.sock")
        self._settings = folder / "settings.json"
        values = {"model": str(model), "data_dir": str(data_dir), "socket_path": self._socket_path, "threads": 1}
        self._settings.write_text(json.dumps({**values, "dtype": "float32", **AHEAD, **settings}))
        self._log = (folder / "log").open("wb+")
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._pending = b""
        self.ready: EngineReady | None = None
        self.events: list[JobEvent] = []
        self.tokens: dict[str, list[Tokens]] = {}
        self._calls = 0

    def __enter__(self) -> EngineProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()
        self._run.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **self._environment}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "coserve.server.engine", "--settings", str(self._settings)],
            env=environment, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(self._socket_path)
                break
            except OSError:
                self._socket.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the engine did not start:\n{self.log()}") from None
                time.sleep(0.05)
        self.ready = self.receive()

    def kill(self) -> None:
        """As `kill -9` would."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
        if self._socket is not None:
            self._socket.close()
        self._pending = b""

    def limit_memory(self, more_bytes: int) -> None:
        """From now on the process gets at most `more_bytes` of address space beside what it has."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more_bytes
        resource.prlimit(self.pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def unlimit_memory(self) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    # ------------------------------------------------------------------ messages

    def send(self, message: Any) -> None:
        self._socket.sendall(encode(message))

    def receive(self, timeout: float = 150.0) -> Any:
        self._socket.settimeout(timeout)
        while True:
            if len(self._pending) >= HEADER_BYTES:
                end = HEADER_BYTES + frame_length(self._pending[:HEADER_BYTES])
                if len(self._pending) >= end:
                    frame, self._pending = self._pending[HEADER_BYTES:end], self._pending[end:]
                    return decode(frame)
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise ConnectionError(f"the engine closed the connection:\n{self.log()}")
            self._pending += chunk

    def pump(self, until, timeout: float = 150.0) -> None:
        """Receive and file messages until `until(message)` is true."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                message = self.receive(timeout=max(0.1, deadline - time.monotonic()))
            except TimeoutError:
                break
            if isinstance(message, Tokens):
                self.tokens.setdefault(message.request_id, []).append(message)
            elif isinstance(message, JobEvent):
                self.events.append(message)
            if until(message):
                return
        raise TimeoutError(f"nothing of the kind came within {timeout} s:\n{self.log()}")

    def submit(self, request_id: str, prompt: list[int], *, tenant: str = "t", adapter=None, salt: str = "s",
               max_tokens: int = 16, seed: int = 0, temperature: float = 0.0, **sampling: Any) -> None:  # fmt: skip
        params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=temperature, **sampling)
        self.send(Generate(request_id, tenant, tuple(prompt), params, adapter, salt, time.monotonic()))

    def finish(self, *request_ids: str, timeout: float = 150.0) -> list[list[int]]:
        """Wait for sequences to end; their token ids."""

        def ended(request_id: str) -> bool:
            messages = self.tokens.get(request_id, [])
            return bool(messages) and messages[-1].finish_reason is not None

        def check(message: Any) -> bool:
            if isinstance(message, Failed) and message.request_id in request_ids:
                raise RuntimeError(f"{message.request_id}: {message.code}: {message.message}")
            return all(ended(r) for r in request_ids)

        if not all(ended(r) for r in request_ids):
            self.pump(check, timeout)
        return [[t for message in self.tokens[r] for t in message.token_ids] for r in request_ids]

    def generate(self, prompt: list[int], **options: Any) -> list[int]:
        self._calls += 1
        name = f"generate-{self._calls}"
        self.submit(name, prompt, **options)
        return self.finish(name)[0]

    def run_job(self, job_id: str, *, timeout: float = 200.0) -> dict[str, Any]:
        """Start a job and wait for its end; the last event's record."""
        self.send(StartJob(job_id, "t"))
        return self.wait_job(job_id, ("finished", "failed", "cancelled"), timeout=timeout)

    def wait_job(self, job_id: str, kinds: tuple[str, ...], timeout: float = 200.0) -> dict[str, Any]:
        self.pump(lambda m: isinstance(m, JobEvent) and m.job_id == job_id and m.record["kind"] in kinds, timeout)
        return self.events[-1].record

    def iterations(self, limit: int = 2000) -> list[dict[str, Any]]:
        self._calls += 1
        call = self._calls
        self.send(GetIterations(call, limit))
        found: list[dict[str, Any]] = []

        def check(message: Any) -> bool:
            if isinstance(message, Iterations) and message.call_id == call:
                found.extend(message.data)
                return True
            return False

        self.pump(check)
        return found


def write_job(
    data_dir: Path, job_id: str, base_digest: str, rows: list[tuple[list[int], list[int]]], *,
    r: int = 4, alpha: float = 8.0, targets: Any = "all-linear", init: str | None = None, seed: int = 0,
    dropout: float = 0.0, **training: Any,
) -> Path:  # fmt: skip
    """spec.json and tokens of a job, as the gateway writes them; rows are (input_ids, labels)."""
    folder = data_dir / "jobs" / job_id
    (folder / "tokens").mkdir(parents=True)
    ids = np.concatenate([np.asarray(i, np.int32) for i, _ in rows])
    labels = np.concatenate([np.asarray(label, np.int32) for _, label in rows])
    offsets = np.cumsum([0] + [len(i) for i, _ in rows]).astype(np.int64)
    save_file({"input_ids": ids, "labels": labels, "offsets": offsets}, folder / "tokens" / "train.safetensors")
    settings = {
        "learning_rate": 1e-2, "lr_scheduler": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "betas": [0.9, 0.999], "eps": 1e-8, "batch_size": 8, "gradient_accumulation_steps": 1, "n_epochs": 1,
        "max_steps": None, "shuffle": False, "eval_every": None, "early_stopping_patience": None,
        "checkpoint_every": None, "keep_checkpoints": 3, "publish_every": None, "priority": "normal", **training,
    }  # fmt: skip
    spec = {
        "job_id": job_id, "tenant": "t", "seed": seed, "base_digest": base_digest,
        "adapter": {"type": "lora", "r": r, "alpha": alpha, "dropout": dropout, "target_modules": targets,
                    "init": init},
        "training": settings, "has_validation": False,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder
