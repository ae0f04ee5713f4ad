"""A whole server as a user starts it, and what a benchmark does to it over HTTP: streams, jobs, counters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import httpx
from peers.completions import CompletionFailed, Completions

READY_SECONDS = 300
STOP_SECONDS = 30


class ServerFailed(RuntimeError):
    """The server did not do what was asked; the message ends with its log."""


class Server:
    """`coserve serve` in a data directory of its own. Context manager; options are those of the command, `environment`
    is for settings without one."""

    def __init__(
        self, model: Path, threads: int, *, environment: Mapping[str, str] | None = None, **options: object
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="coserve-bench-")
        self.data_dir = Path(self._folder.name) / "data"
        self._log = (Path(self._folder.name) / "log").open("w+b")
        values = {"model": model, "data_dir": self.data_dir, "port": 0, "dtype": "float32", "threads": threads}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**values, **options}.items()]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "coserve.server.cli", "serve", *arguments],
            env={**harness.environment(threads), **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.port = 0
        self.model_id = model.name
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The supervisor ends its children when it ends."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def failure(self, text: str) -> ServerFailed:
        return ServerFailed(f"{text}\n{Path(self._log.name).read_text(errors='replace')[-4000:]}")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A completion that fails, fails with the server's log."""
        try:
            yield
        except CompletionFailed as error:
            raise self.failure(str(error)) from error

    def _wait_ready(self) -> None:
        watchdog = threading.Timer(READY_SECONDS, self._process.kill)
        watchdog.start()
        try:
            if self._process.stdout is None:
                raise self.failure("the server has no standard output")
            for line in self._process.stdout:
                found = re.search(r"OPENAI_BASE_URL=http://127\.0\.0\.1:(\d+)/v1", line)
                if found:
                    self.port = int(found[1])
                    break
        finally:
            watchdog.cancel()
        if not self.port:
            raise self.failure("the server did not start:")
        key = (self.data_dir / "admin-key").read_text().strip()
        self._completions = Completions(self.port, self.model_id, key)
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"authorization": f"Bearer {key}"}, timeout=60,
            trust_env=False,
        )  # fmt: skip

    # ------------------------------------------------------------------ counters

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics; the engine's part is at most a second old."""
        lines = self._http.get("/metrics").raise_for_status().text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def iterations(self, began: float, ended: float) -> list[dict[str, Any]]:
        """The engine's records of the iterations that began in this wall-clock time; it keeps the newest 2,000."""
        answer = self._http.get("/v1/coserve/iterations", params={"limit": 2000}).raise_for_status().json()
        return [record for record in answer["data"] if began <= record["started_at"] < ended]

    # ------------------------------------------------------------------ generation

    def tenant(self, name: str) -> Completions:
        """A client with a key of that tenant."""
        made = self._http.post("/v1/organization/api_keys", json={"tenant": name})
        self._check(made)
        return Completions(self.port, self.model_id, made.json()["key"])

    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds from the first request to the last token of all, sent at once."""
        with self._explained():
            return self._completions.generate(prompts, new_tokens)

    def load(
        self, streams: int, seconds: float, prompts: Iterator[list[int]], new_tokens: int,
        enough: Callable[[], bool] = lambda: True, longer: float = 0.0, client_of: Completions | None = None,
    ) -> Load:  # fmt: skip
        """`streams` clients that send one request after another. Measured from when all of them have a token, for
        `seconds`, and on until `enough()`, `longer` seconds at most. Their first requests are of different lengths, so
        that they do not end as one."""
        load, completions = Load(streams), client_of or self._completions

        async def client(number: int, started: set[int], stop: asyncio.Event) -> None:
            length = max(2, new_tokens * (number + 1) // streams)
            while not stop.is_set():
                asked, first, before = time.perf_counter(), None, None
                async with contextlib.aclosing(completions.stream(next(prompts), length)) as pieces:
                    async for now, count in pieces:
                        load.pieces.append((now, count, None if before is None else now - before))
                        first, before = first or now, now
                        started.add(number)
                        if stop.is_set():
                            return
                if first is not None and before is not None:
                    load.requests.append((asked, first, before, length))
                length = new_tokens

        async def every() -> None:
            started, stop = set[int](), asyncio.Event()
            clients = [asyncio.ensure_future(client(i, started, stop)) for i in range(streams)]
            while len(started) < streams and not any(c.done() for c in clients):
                await asyncio.sleep(0.01)
            load.began, load.wall_began = time.perf_counter(), time.time()
            await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            last = time.perf_counter() + longer
            while not enough() and time.perf_counter() < last and not any(c.done() for c in clients):
                await asyncio.sleep(0.25)
            load.ended, load.wall_ended = time.perf_counter(), time.time()
            stop.set()
            await asyncio.gather(*clients)

        with self._explained():
            asyncio.run(every())
        return load

    # ------------------------------------------------------------------ training

    def start_job(
        self, rows: list[dict[str, list[int]]], batch: int, steps: int, rank: int = 16,
        client_of: Completions | None = None,
    ) -> Job:  # fmt: skip
        """A finetuning job on pre-tokenized rows, one epoch or several until `steps` are done."""
        headers = {} if client_of is None else {"authorization": f"Bearer {client_of.key}"}
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file = {"file": ("rows.jsonl", lines)}
        made = self._http.post("/v1/files", data={"purpose": "fine-tune"}, files=file, headers=headers)
        self._check(made)
        training = {"max_steps": steps, "shuffle": False, "lr_scheduler": "constant"}
        body = {
            "model": self.model_id, "training_file": made.json()["id"],
            "hyperparameters": {"batch_size": batch, "n_epochs": 50},
            "adapter": {"type": "lora", "r": rank, "alpha": 2 * rank, "target_modules": "all-linear"},
            "training": training,
        }  # fmt: skip
        created = self._http.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        self._check(created)
        return Job(self, created.json()["id"], headers)

    def job_status(self, job_id: str, headers: Mapping[str, str]) -> dict[str, Any]:
        return self._http.get(f"/v1/fine_tuning/jobs/{job_id}", headers=headers).raise_for_status().json()

    def cancel_job(self, job_id: str, headers: Mapping[str, str]) -> None:
        self._http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel", headers=headers).raise_for_status()

    def _check(self, response: httpx.Response) -> None:
        if response.is_error:
            raise self.failure(f"the server answered {response.status_code}: {response.text}")


@dataclass
class Load:
    """What streams brought; what came between `began` and `ended` (perf_counter seconds) counts."""

    streams: int
    pieces: list[tuple[float, int, float | None]] = field(default_factory=list)  # arrival, tokens, gap in its stream
    requests: list[tuple[float, float, float, int]] = field(default_factory=list)  # sent, first token, last, tokens
    began: float = 0.0
    ended: float = 0.0
    wall_began: float = 0.0
    wall_ended: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(n for at, n, _ in self.pieces if self.began < at <= self.ended) / (self.ended - self.began)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies as a client sees them; a piece of several tokens is one gap."""
        return [gap for at, _, gap in self.pieces if gap is not None and self.began < at <= self.ended]

    def kept(self, itl: float, ttft: float) -> list[bool]:
        """For each request that was sent and ended in the time that counts: whether its first token came within
        `ttft` seconds and its others at `itl` seconds a token or less."""
        whole = [r for r in self.requests if r[0] >= self.began and r[2] <= self.ended]
        return [
            first - sent <= ttft and (last - first) / max(1, tokens - 1) <= itl for sent, first, last, tokens in whole
        ]


class Job:
    """A finetuning job and the engine's own record of its steps."""

    def __init__(self, server: Server, job_id: str, headers: Mapping[str, str]) -> None:
        self._server, self.id, self._headers = server, job_id, headers
        self._events = server.data_dir / "jobs" / job_id / "events.jsonl"

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Records of these kinds, oldest first."""
        if not self._events.exists():
            return []
        whole = self._events.read_text().rpartition("\n")[0]
        records = [json.loads(line) for line in whole.splitlines()]
        return [record for record in records if record["kind"] in kinds]

    def wait_steps(self, count: int, seconds: float = 3600) -> list[dict[str, Any]]:
        """The step records, once there are `count`."""
        deadline = time.monotonic() + seconds
        while len(steps := self.events("step")) < count:
            status = self._server.job_status(self.id, self._headers)
            if status["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise self._server.failure(f"the job is {status['status']} with {len(steps)} steps: {status['error']}")
            time.sleep(0.2)
        return steps

    def wait_end(self) -> None:
        """Returns once it has ended by itself."""
        while (status := self._server.job_status(self.id, self._headers))["status"] != "succeeded":
            if status["status"] in ("failed", "cancelled"):
                raise self._server.failure(f"the job is {status['status']}: {status['error']}")
            time.sleep(0.1)

    def cancel(self) -> None:
        """Returns once it has stopped; a job that has ended by itself is left alone."""
        if self._server.job_status(self.id, self._headers)["status"] == "running":
            self._server.cancel_job(self.id, self._headers)
        while self._server.job_status(self.id, self._headers)["status"] == "running":
            time.sleep(0.1)


def step_rate(records: list[dict[str, Any]]) -> float | None:
    """Tokens a second of the completed steps after the first record, whose time is the start."""
    if len(records) < 2:
        return None
    seconds = records[-1]["created_at"] - records[0]["created_at"]
    return sum(record["data"]["tokens"] for record in records[1:]) / seconds


# --------------------------------------------------------------------------- made-up inputs


def random_prompts(rng: random.Random, length: int, vocabulary: int) -> Iterator[list[int]]:
    """Prompts of `length` tokens on average, a quarter of it up or down; no two alike, so that no cache helps."""
    while True:
        count = length + rng.randint(-(length // 4), length // 4)
        yield [rng.randrange(3, vocabulary) for _ in range(count)]


def training_rows(rng: random.Random, count: int, length: int, labels: int, vocabulary: int) -> list[dict[str, Any]]:
    """Rows of `length` random tokens whose last `labels` bear a loss."""
    rows = []
    for _ in range(count):
        ids = [rng.randrange(3, vocabulary) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length - labels) + ids[length - labels :]})
    return rows
