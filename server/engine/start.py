"""Puts an engine together: model, cache, pool, books, calibration, scheduler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.policy import Scheduler
from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pages import USUAL_RANK, pages_at_rank
from coserve.server.engine.adapter_pool import AdapterPool, Weights
from coserve.server.engine.adapters import AdapterBook, too_large
from coserve.server.engine.calibration import Calibration
from coserve.server.engine.checking import FolderCheck
from coserve.server.engine.cores import CoreSharing
from coserve.server.engine.decode_shapes import sizes
from coserve.server.engine.holdings import Holdings
from coserve.server.engine.intake import Intake
from coserve.server.engine.iterations import IterationLog
from coserve.server.engine.kv_cache import KVCache, block_bytes
from coserve.server.engine.live_sweeps import LiveSweeps
from coserve.server.engine.load import LoadedModel, ModelRefused, load_model
from coserve.server.engine.loop import Engine
from coserve.server.engine.model import BaseModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.page_source import BlockPages
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.readings import LOGIT_ROWS
from coserve.server.engine.requests import RequestBook
from coserve.server.engine.runner import Runner
from coserve.server.engine.shapes import layer_shapes, layer_windows
from coserve.server.engine.shares import Shares
from coserve.server.engine.stats import StatsClock
from coserve.server.engine.trainer import Trainer
from coserve.server.training.fault import is_out_of_memory
from coserve.server.training.peft.folder import read_folder
from coserve.server.wire.lifeline import Heartbeat
from coserve.server.wire.messages import EngineReady
from coserve.server.wire.sync import EngineSocket

if TYPE_CHECKING:
    from coserve.server.engine.decode_graphs import DecodeGraphs

log = logging.getLogger("coserve.engine")

# A CPU's automatic inter-token promise, in decode steps of four streams: two would cut prompts and training into pieces
# so small that a third of the throughput goes (16 requests at once: 160 against 235 tokens/s).
_ITL_STEPS = 4.0
_TTFT_STEPS = 10.0  # and its first-token promise, in inter-token promises
_CUDA_ITL, _CUDA_TTFT = 0.050, 1.0
_BATCH_ITL, _BATCH_TTFT = 4.0, 10.0  # the batch class's promises, in those of interactive requests


Load = Callable[[EngineOptions], LoadedModel]
Policy = Callable[[SchedulerConfig], Scheduler]


def build_engine(
    options: EngineOptions, heartbeat: Heartbeat, load: Load = load_model, policy: Policy = Scheduler
) -> tuple[Engine, Intake]:
    """Everything up to, not including, the first iteration. Raises ModelRefused.

    Benchmarks bring a model that is in no folder (`load`), and rivals that plan in the scheduler's place (`policy`).
    """
    try:
        return _build(options, heartbeat, load, policy)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelRefused(
            f"{options.model}: memory ran out while the engine started; lower --kv-memory, --adapter-memory or "
            "--max-running, choose --dtype bfloat16, or take a smaller model"
        ) from error


def _build(options: EngineOptions, heartbeat: Heartbeat, load: Load, policy: Policy) -> tuple[Engine, Intake]:
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load(options)
    model = loaded.base
    blocks, cache = _kv_cache(loaded, options)
    pool = _pool(loaded, options, blocks, cache)

    def read(folder: Path) -> Weights:
        return pool.image_of(read_folder(folder, model.sites, loaded.digest)[1])

    loader = AdapterLoader(read, options.adapter_cache_bytes())
    adapters = AdapterBook(pool, loader, options.data_dir)
    try:
        return _assemble(loaded, blocks, cache, pool, loader, adapters, options, heartbeat, policy)
    except BaseException:
        adapters.close()  # its thread would keep the pool
        raise


def _assemble(
    loaded: LoadedModel, blocks: BlockManager, cache: KVCache, pool: AdapterPool, loader: AdapterLoader,
    adapters: AdapterBook, options: EngineOptions, heartbeat: Heartbeat, policy: Policy,
) -> tuple[Engine, Intake]:  # fmt: skip
    """All that works on what was allocated."""
    model = loaded.base
    most = SchedulerConfig()
    model.compile_products(most.max_chunk + options.running() + options.window(), max(LOGIT_ROWS, most.head_rows))
    calibrated = RequestBook(blocks, 1.0, 1.0)
    cores = CoreSharing() if model.device.type == "cpu" else None
    graphs = _decode_graphs(loaded, cache, pool)
    trial = Runner(model, cache, calibrated, adapters, cores, graphs)
    usual_pages = _pages(model, USUAL_RANK, pool.page_elements)
    calibration = Calibration(model, trial, calibrated, loaded.max_model_len, usual_pages)
    step = calibration.measure(options.window())
    itl, ttft = _promises(options, step)
    scheduler = policy(
        SchedulerConfig(
            itl_seconds=itl, ttft_seconds=ttft, floor_share=options.floor_share, layer_windows=layer_windows(model),
            graph_rows=() if graphs is None else sizes(options.running()), usual_pages=usual_pages,
        )
    )  # fmt: skip
    calibration.teach(scheduler)
    log.info("decode step at four streams %.1f ms; inter-token promise %.0f ms, first token %.0f ms",
             step * 1e3, itl * 1e3, ttft * 1e3)  # fmt: skip

    batch = _batch_promises(options, itl, ttft)
    shares = Shares(blocks.num_blocks, pool.room.whole)
    requests = RequestBook(blocks, itl, ttft, batch=batch)
    live = LiveSweeps(model, options, blocks, cache, options.activation_bytes() // cache.block_bytes)
    trainer = Trainer(
        model, pool, live, options, loaded.digest, Path(options.model).name, shares, served=scheduler.share.served
    )
    iterations = IterationLog(os.getpid())
    socket = EngineSocket(options.socket_path)
    checks = FolderCheck(options.data_dir, model.sites, loaded.digest, lambda weights: too_large(weights, pool))
    holdings = Holdings(model, cache, pool, trainer, loader, graphs)
    promises = {"coserve_slo_itl_seconds": itl, "coserve_slo_ttft_seconds": ttft}

    def ready() -> EngineReady:
        return EngineReady(
            pid=os.getpid(), base_digest=loaded.digest, model_type=loaded.model_type,
            dtype=str(model.dtype).removeprefix("torch."), device=str(model.device), vocab_size=model.vocab_size,
            max_model_len=loaded.max_model_len, kv_blocks=blocks.num_blocks, block_size=blocks.block_size,
            lora_sites=tuple(sorted({site.name.rsplit(".", 1)[-1] for site in model.sites})),
            slo_itl_seconds=itl, slo_ttft_seconds=ttft, slo_batch_itl_seconds=batch[0],
            slo_batch_ttft_seconds=batch[1], running_requests=requests.ids, running_jobs=trainer.job_ids,
        )  # fmt: skip

    intake = Intake(socket, ready, requests, adapters, trainer, checks, iterations, loaded.max_model_len, shares)
    stats = StatsClock(socket, requests, trainer, pool, iterations, lambda: promises | holdings.gauges(), scheduler)
    runner = Runner(model, cache, requests, adapters, cores, graphs, options.plan_ahead, lambda: socket.asked)
    engine = Engine(
        socket, intake, requests, adapters, trainer, scheduler, runner, iterations, stats,
        shares=shares, max_running=options.running(), beat=heartbeat.beat,
        max_adapters=lambda: adapters.capacity(r.version for r in requests),
    )  # fmt: skip
    socket.start()
    return engine, intake


def _kv_cache(loaded: LoadedModel, options: EngineOptions) -> tuple[BlockManager, KVCache]:
    shapes = layer_shapes(loaded.base)
    bytes_each = block_bytes(shapes, options.block_size, loaded.base.dtype)
    longest = -(-loaded.max_model_len // options.block_size)
    # Never more than every running sequence could use at once.
    scratch = loaded.base.backend.captures  # for rows that only fill a graph up
    count = min(options.kv_bytes() // bytes_each - scratch, options.running() * longest)
    for_training, for_adapters = options.activation_bytes() // bytes_each, options.adapter_bytes() // bytes_each
    if count < 1:
        raise ModelRefused(
            f"--kv-memory {options.kv_bytes()} holds no block: one block of {options.block_size} tokens takes "
            f"{bytes_each} bytes of this model; give at least {bytes_each * (longest + scratch)} for one full context"
        )
    if count < longest:
        log.warning(
            "--kv-memory holds %d tokens, less than one context of %d: longer sequences need memory of training and "
            "adapters, or are refused", count * options.block_size, loaded.max_model_len,
        )  # fmt: skip
    # One memory: generation may use all of it, training and adapters their parts at the most.
    count += for_training + for_adapters
    manager = BlockManager(count, options.block_size)
    cache = KVCache(shapes, count, options.block_size, loaded.base.dtype, loaded.base.device, scratch=scratch)
    return manager, cache


def _decode_graphs(loaded: LoadedModel, cache: KVCache, pool: AdapterPool) -> DecodeGraphs | None:
    if not loaded.base.backend.captures or loaded.base.device.type != "cuda":
        return None
    # Here and not above: it imports Triton, which an installation without a GPU does not have.
    from coserve.server.engine.decode_graphs import DecodeGraphs

    return DecodeGraphs(loaded.base, cache, pool, loaded.max_model_len)


def _pool(loaded: LoadedModel, options: EngineOptions, blocks: BlockManager, cache: KVCache) -> AdapterPool:
    """In blocks of the K/V cache, of which it may have none (--adapter-memory 0)."""
    base, wanted, most = loaded.base, options.adapter_bytes(), options.adapter_bytes() // cache.block_bytes
    source = BlockPages(cache, blocks, most, options.adapter_page_rows * base.hidden_size)
    least = -(-_pages(base, 1, source.page_elements) // source.unit_pages)
    if wanted and most < least:
        raise ModelRefused(
            f"--adapter-memory {wanted} holds no adapter of this model: one of rank 1 at every linear layer takes "
            f"{least} blocks of {cache.block_bytes} bytes; give at least {least * cache.block_bytes}, or 0 to serve "
            "the model alone"
        )
    pool = blocks.borrower = AdapterPool(source)
    return pool


def _pages(model: BaseModel, rank: int, page_elements: int) -> int:
    """Of an adapter of this rank at every linear layer."""
    return sum(pages_at_rank(rank, site.in_features, site.out_features, page_elements) for site in model.sites)


def _promises(options: EngineOptions, decode_step: float) -> tuple[float, float]:
    """(inter-token, first-token) seconds."""
    cuda = options.torch_device().type == "cuda"
    itl = options.slo_itl_ms / 1e3 if options.slo_itl_ms else _CUDA_ITL if cuda else _ITL_STEPS * decode_step
    ttft = options.slo_ttft_ms / 1e3 if options.slo_ttft_ms else _CUDA_TTFT if cuda else _TTFT_STEPS * itl
    return itl, ttft


def _batch_promises(options: EngineOptions, itl: float, ttft: float) -> tuple[float, float]:
    """The same of the batch class."""
    return (
        options.slo_batch_itl_ms / 1e3 if options.slo_batch_itl_ms else _BATCH_ITL * itl,
        options.slo_batch_ttft_ms / 1e3 if options.slo_batch_ttft_ms else _BATCH_TTFT * ttft,
    )
