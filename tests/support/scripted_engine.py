"""An engine whose every move the test decides, at the other end of a real socket; and a gateway that talks to it.

For what a real engine does too rarely or too fast to test: lost and repeated events, crashes, slow pauses. It speaks
the wire's messages and writes event files as the real one does, and runs no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from tiny_models import byte_tokenizer

from coserve.server.app import create_app
from coserve.server.config import Settings
from coserve.server.gateway.assembly import assemble
from coserve.server.gateway.services import Services
from coserve.server.store.datadir import DataDirectory
from coserve.server.wire.codec import HEADER_BYTES, decode, encode, frame_length
from coserve.server.wire.messages import (
    AdapterChecked,
    AdapterDropped,
    AdaptersPinned,
    CheckAdapter,
    DropAdapter,
    EngineReady,
    GetIterations,
    Iterations,
    JobEvent,
    PinAdapters,
    StartJob,
    StopJob,
)  # fmt: skip

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ScriptedEngine:
    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._folder = tempfile.TemporaryDirectory(prefix="cs-")
        self.socket_path = f"{self._folder.name}/e.sock"
        self.pid = 100
        self.base_digest = "b" * 64
        self.running_jobs: tuple[str, ...] = ()
        self.received: list[Any] = []
        self.drops_answered = True
        self.pins_refused: dict[str, str] = {}  # digest -> why
        self.connections = 0
        self._silent = False
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self, *, silent: bool = False) -> None:
        """`silent`: it listens, and never says that it is ready."""
        self._silent = silent
        self._server = await asyncio.start_unix_server(self._serve, self.socket_path)

    async def stop(self) -> None:
        """The process is gone: nobody listens any more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        with contextlib.suppress(FileNotFoundError):
            Path(self.socket_path).unlink()

    async def crash(self) -> None:
        """`kill -9`, and another process in its place that knows of no job."""
        await self.stop()
        self.pid += 1
        self.running_jobs = ()
        await self.start()

    async def close(self) -> None:
        await self.stop()
        self._folder.cleanup()

    def of(self, kind: type) -> list[Any]:
        """Messages of one type that came so far."""
        return [message for message in self.received if isinstance(message, kind)]

    def started(self) -> list[str]:
        return [message.job_id for message in self.of(StartJob)]

    def stops(self) -> list[tuple[str, bool]]:
        return [(message.job_id, message.pause) for message in self.of(StopJob)]

    def write(self, job_id: str, kind: str, message: str = "", *, level: str = "info", **data: Any) -> JobEvent:
        """Append to the job's event file without telling the gateway."""
        path = self.data_dir / "jobs" / job_id / "events.jsonl"
        seq = 1 + (len(path.read_bytes().splitlines()) if path.exists() else 0)
        record = {"seq": seq, "created_at": time.time(), "kind": kind, "level": level, "message": message, "data": data}
        with path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
        return JobEvent(job_id, seq, record)

    def push(self, event: JobEvent) -> None:
        self._writer.write(encode(event))

    def tell(self, job_id: str, kind: str, message: str = "", **data: Any) -> JobEvent:
        event = self.write(job_id, kind, message, **data)
        self.push(event)
        return event

    def folder(self, relative: str, content: bytes = b"weights", rank: int = 4) -> str:
        """A PEFT folder, as the engine leaves one, with a state beside it; its digest."""
        path = self.data_dir / relative
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
        (path / "adapter_model.safetensors").write_bytes(content)
        (path / "optimizer.safetensors").write_bytes(b"moments")
        return hashlib.sha256(content).hexdigest()

    def step(self, job_id: str, step: int, total: int = 10, *, loss: float = 1.5) -> None:
        self.tell(
            job_id, "step", f"Step {step}/{total}: training loss={loss:.2f}", step=step, total_steps=total,
            train_loss=loss, train_mean_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, tokens=100,
            loss_tokens=50,
        )  # fmt: skip

    def checkpoint(self, job_id: str, step: int, content: bytes = b"checkpoint") -> str:
        path = f"jobs/{job_id}/checkpoints/step-{step:08d}"
        digest = self.folder(path, content)
        self.tell(
            job_id, "checkpoint", f"Checkpoint created at step {step}", step=step, path=path, digest=digest,
            metrics={"step": step, "train_loss": 1.25}, resumable=True,
        )  # fmt: skip
        return digest

    def finish(self, job_id: str, step: int = 10, content: bytes = b"final") -> str:
        path = f"jobs/{job_id}/checkpoints/step-{step:08d}"
        digest = self.folder(path, content)
        result = f"jobs/{job_id}/result.csv"
        (self.data_dir / result).write_text("step,train_loss\n1,1.5\n")
        self.tell(
            job_id, "finished", "done", step=step, path=path, digest=digest, trained_tokens=1234, result_file=result
        )
        return digest

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.connections += 1
        if not self._silent:
            writer.write(encode(EngineReady(
                self.pid, self.base_digest, "llama", "float32", "cpu", 512, 256, 64, 16, SITES, 0.05, 1.0,
                0.2, 10.0, (), self.running_jobs,
            )))  # fmt: skip
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                message = decode(await reader.readexactly(frame_length(header)))
                self.received.append(message)
                answer = self._answer(message)
                if answer is not None:
                    writer.write(encode(answer))

    def _answer(self, message: Any) -> Any:
        match message:
            case CheckAdapter():
                tensors = (self.data_dir / message.path / "adapter_model.safetensors").read_bytes()
                if tensors.startswith(b"bad"):
                    return AdapterChecked(message.call_id, "tensor 'x' holds NaN; train it again", "x")
                return AdapterChecked(message.call_id, None, None, hashlib.sha256(tensors).hexdigest(), 4, len(tensors))
            case DropAdapter() if self.drops_answered:
                return AdapterDropped(message.call_id)
            case PinAdapters():
                digests = {version.digest for version in message.versions}
                return AdaptersPinned(message.call_id, {d: why for d, why in self.pins_refused.items() if d in digests})
            case GetIterations():
                return Iterations(message.call_id, ({"seq": 1}, {"seq": 2})[-message.limit :])
        return None


class World:
    """A gateway's services and its application, with one client a tenant."""

    def __init__(self, services: Services, engine: ScriptedEngine, clients: dict[str, httpx.AsyncClient]) -> None:
        self.services = services
        self.engine = engine
        self.admin = clients["admin"]
        self.a = clients["a"]
        self.b = clients["b"]
        self.nobody = clients["nobody"]

    async def upload(self, client: httpx.AsyncClient | None = None, rows: int = 20, purpose: str = "fine-tune") -> str:
        text = "".join(json.dumps({"prompt": f"say {i}", "completion": f" number {i}"}) + "\n" for i in range(rows))
        answer = await (client or self.a).post(
            "/v1/files", files={"file": ("train.jsonl", text.encode())}, data={"purpose": purpose}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    async def create(self, client: httpx.AsyncClient | None = None, *, file: str | None = None, **body: Any) -> dict:
        file = file or await self.upload(client)
        answer = await (client or self.a).post(
            "/v1/fine_tuning/jobs", json={"model": "base", "training_file": file, **body}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def job(self, job_id: str) -> dict:
        return (await self.a.get(f"/v1/fine_tuning/jobs/{job_id}")).json()

    async def status(self, job_id: str, wanted: str, seconds: float = 50) -> dict:
        """Wait until the job has a status."""

        async def reached() -> dict | None:
            job = await self.job(job_id)
            return job if job.get("status") == wanted else None

        return await self.until(reached, seconds)

    async def started(self, job_id: str, times: int = 1) -> None:
        """Wait until the engine was told to start the job that often."""
        await self.until(lambda: self.engine.started().count(job_id) >= times)

    async def running(self, **body: Any) -> str:
        """A job that the engine has begun; its id."""
        job_id = (await self.create(**body))["id"]
        await self.started(job_id)
        self.engine.tell(job_id, "started", "Fine-tuning job started", total_steps=10)
        await self.status(job_id, "running")
        return job_id

    async def until(self, condition: Callable[[], Any | Awaitable[Any]], seconds: float = 50) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.005)

    async def messages(self, job_id: str) -> list[str]:
        """The job's event messages, oldest first."""
        answer = await self.a.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=1000")
        return [event["message"] for event in reversed(answer.json()["data"])]


def model_folder(folder: Path) -> Path:
    """What a gateway reads of a model: its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
    )
    return folder


@asynccontextmanager
async def gateway(root: Path, engine: ScriptedEngine, **settings: Any) -> AsyncIterator[World]:
    """A gateway on the data directory `root`/data, for one lifetime; `engine` may outlive it."""
    values = {"model": str(model_folder(root / "base")), "data_dir": engine.data_dir, **settings}
    async with AsyncExitStack() as leave:
        services = await assemble(Settings.model_validate(values), engine.socket_path, leave)
        app = create_app(services)
        admin = services.data.admin_key.read_text().strip()
        clients: dict[str, httpx.AsyncClient] = {}

        async def client(name: str, key: str | None) -> httpx.AsyncClient:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            clients[name] = httpx.AsyncClient(transport=transport, base_url="http://coserve", headers=headers)
            return await leave.enter_async_context(clients[name])

        await client("nobody", None)
        await client("admin", admin)
        for name in ("a", "b"):
            made = await clients["admin"].post("/v1/organization/api_keys", json={"tenant": name})
            await client(name, made.json()["key"])
        yield World(services, engine, clients)


def in_world(root: Path, scenario: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    """Run `scenario` against a fresh gateway and scripted engine."""

    async def run() -> None:
        data = DataDirectory(root / "data")
        data.prepare()
        engine = ScriptedEngine(data.root)
        await engine.start()
        try:
            async with gateway(root, engine, **settings) as world:
                await world.until(lambda: world.services.engine.engine is not None)
                async with asyncio.timeout(200):
                    await scenario(world)
        finally:
            await engine.close()

    asyncio.run(run())
