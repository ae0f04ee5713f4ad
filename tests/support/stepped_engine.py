"""An engine in this process whose iterations the test turns one by one: every part is real, only nobody listens."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from engine_process import SamplingParams
from gradient_oracle import engine_model

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.policy import Scheduler
from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.adapters import AdapterBook, too_large
from coserve.server.engine.checking import FolderCheck
from coserve.server.engine.holdings import Holdings
from coserve.server.engine.intake import Intake
from coserve.server.engine.iterations import IterationLog
from coserve.server.engine.kv_cache import KVCache, block_bytes
from coserve.server.engine.live_sweeps import LiveSweeps
from coserve.server.engine.loop import Engine
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.page_source import BlockPages
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.requests import RequestBook
from coserve.server.engine.runner import Runner
from coserve.server.engine.shapes import layer_shapes
from coserve.server.engine.shares import Shares
from coserve.server.engine.stats import StatsClock
from coserve.server.engine.trainer import Trainer
from coserve.server.training.peft.folder import read_folder, version_digest
from coserve.server.wire.messages import AdapterRef, Generate, Tokens
from coserve.server.wire.sync import EngineSocket

AHEAD = os.environ.get("COSERVE_TEST_PLAN_AHEAD") == "1" or None  # as on a GPU: any test may be run in this way
DIGEST = "b" * 64
ONE_ADAPTER = 7 * 12_288  # bytes: blocks of one of rank 4 or less at every linear layer of Llama, for `pool_bytes`


class SentMessages(EngineSocket):
    """The socket of an engine that is not connected, which remembers what was said."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.sent: list[Any] = []

    def send(self, message: Any) -> bool:
        self.sent.append(message)
        return super().send(message)


class SteppedEngine:
    """Llama at toy size in float32. Blocks of 16 tokens: `activation_blocks` of them more for training, or none, and
    then it may have them all; and more for adapters, `pool_bytes` together."""

    def __init__(
        self, data_dir: Path, *, blocks: int = 64, activation_blocks: int = 0, pool_bytes: int = 2**20,
        architecture: str = "llama", backend: Any = None, device: Any = "cpu", graphs_of: Any = None,
        itl: float = 1.0, ahead: bool | None = AHEAD, asked: Any = lambda: False, **options: Any,
    ) -> None:  # fmt: skip
        self.data_dir = data_dir
        self.model = model = engine_model(architecture, torch.float32, backend=backend, device=device)
        self.socket = SentMessages(str(data_dir / "e.sock"))
        shapes = layer_shapes(model)
        pool_blocks = pool_bytes // block_bytes(shapes, 16, torch.float32)
        manager = BlockManager(blocks + activation_blocks + pool_blocks, 16)
        self.cache = cache = KVCache(
            shapes, manager.num_blocks, 16, torch.float32, device, scratch=model.backend.captures
        )
        self.pool = manager.borrower = AdapterPool(BlockPages(cache, manager, pool_blocks, 8 * model.hidden_size))
        loader = AdapterLoader(lambda path: self.pool.image_of(read_folder(path, model.sites, DIGEST)[1]), 0)
        self.adapters = AdapterBook(self.pool, loader, data_dir)
        self.requests = RequestBook(manager, 1.0, 1.0)
        values = {"model": "base", "data_dir": data_dir, "socket_path": "", "dtype": "float32", **options}
        blocks += activation_blocks
        engine_options = EngineOptions(**values)
        live = LiveSweeps(model, engine_options, self.requests.blocks, cache, activation_blocks or blocks)
        scheduler = Scheduler(SchedulerConfig(itl_seconds=itl))
        shares = Shares(blocks, self.pool.room.whole)
        self.trainer = Trainer(
            model, self.pool, live, engine_options, DIGEST, "base", shares, served=scheduler.share.served
        )
        iterations = IterationLog(0)
        self.counters = iterations.counters
        checks = FolderCheck(data_dir, model.sites, DIGEST, lambda weights: too_large(weights, self.pool))
        self.intake = Intake(
            self.socket, lambda: None, self.requests, self.adapters, self.trainer, checks, iterations, 512, shares
        )
        graphs = None if graphs_of is None else graphs_of(model, cache, self.pool)
        self.holdings = Holdings(model, cache, self.pool, self.trainer, loader, graphs)
        stats = StatsClock(
            self.socket, self.requests, self.trainer, self.pool, iterations, self.holdings.gauges, scheduler
        )
        self.engine = Engine(
            self.socket, self.intake, self.requests, self.adapters, self.trainer, scheduler,
            Runner(model, cache, self.requests, self.adapters, graphs=graphs, ahead=ahead, asked=asked),
            iterations, stats, shares=shares, max_running=64, beat=lambda: None,
            max_adapters=lambda: self.adapters.capacity(r.version for r in self.requests),
        )  # fmt: skip

    def ref(self, name: str) -> AdapterRef:
        """The version in the PEFT folder of that name."""
        config, weights = read_folder(self.data_dir / name, self.model.sites, DIGEST)
        return AdapterRef(version_digest(DIGEST, config, weights), name)

    def submit(self, request_id: str, ids: list[int], adapter: AdapterRef | None = None, max_tokens: int = 16,
               **sampling: Any) -> None:  # fmt: skip
        params = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, **sampling)
        self.requests.add(Generate(request_id, "t", tuple(ids), params, adapter, "s", time.monotonic()))

    def until(self, condition: Any, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            if not self.engine.step():
                time.sleep(0.001)

    def tokens(self, request_id: str) -> list[int]:
        """What was sent of a sequence so far."""
        said = (m for m in self.socket.sent if isinstance(m, Tokens) and m.request_id == request_id)
        return [t for m in said for t in m.token_ids]
