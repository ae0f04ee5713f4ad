"""Decode iterations through buffers that never move, and their CUDA graphs: one launch instead of a thousand.

A graph is captured when its shape is first met, after two runs that bring every kernel into being. Where that is not
possible (a model that asks the device something half-way, too little memory) the shape runs as any other pass.
Imports Triton, as its pass uses the kernels. `StaticDecode.run` is ordinary code: it is what a graph records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coserve.kernels.attention.batch import PagedBatch
from coserve.kernels.attention.paged import paged_attention
from coserve.kernels.attention.training import Score
from coserve.kernels.lora import Family, PageTable, Routing, family_for
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.backend import AdapterTerms
from coserve.server.engine.containment import give_back_memory
from coserve.server.engine.decode_shapes import BLOCK_ROWS, DecodeArrays, DecodeRow, DecodeShape, shape_for
from coserve.server.engine.generation import RowRun
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.model import BaseModel
from coserve.server.engine.triton_backend import FixedTerms
from coserve.server.training.fault import device_lost
from coserve.server.training.peft.sites import Site
from coserve.server.training.storages import storage_bytes

log = logging.getLogger("coserve.engine")


class StaticDecode:
    """The buffers of one shape, and a pass over them."""

    def __init__(self, model: BaseModel, cache: KVCache, pool: AdapterPool, shape: DecodeShape) -> None:
        """`cache` must have a scratch block."""
        self.shape, self._model, self._cache = shape, model, cache
        self.arrays = DecodeArrays(shape, cache.block_size, cache.scratch_block)
        device, rows = model.device, shape.rows
        pinned = device.type == "cuda"
        self._host = [
            torch.zeros(sum(sizes), dtype=dtype, pin_memory=pinned)
            for sizes, dtype in ((self.arrays.wide_sizes, torch.int64), (self.arrays.narrow_sizes, torch.int32))
        ]
        self._device = [torch.zeros_like(host, device=device) for host in self._host]
        self._ids, self._positions, self._slots = self._device[0].split(self.arrays.wide_sizes)
        contexts, tables, packed, owners, blocks = self._device[1].split(self.arrays.narrow_sizes)
        one_by_one = torch.arange(rows, dtype=torch.int32, device=device)
        self._batch = PagedBatch(
            segments=(), block_size=cache.block_size, tables=tables.view(rows, shape.width), contexts=contexts,
            starts=one_by_one, counts=torch.ones_like(one_by_one), prefill=one_by_one.new_empty(0, 2),
            decode=torch.stack([one_by_one, torch.zeros_like(one_by_one)], 1), tile_rows=1,
            longest_decode=shape.width * cache.block_size,
        )  # fmt: skip
        self._source: PageTable | None = None
        self._table = _empty_table(model, pool, shape) if shape.rank else None
        none = one_by_one.new_empty(0)
        routing = Routing((), rows, BLOCK_ROWS, packed, owners, blocks.view(-1, 3), none.view(0, 3), none)
        self.adapters: AdapterTerms = FixedTerms(routing, self._table, shape.family)

    def load(self, batch: Sequence[DecodeRow], table: PageTable | None) -> None:
        """Put a batch in: two copies, and four launches more where the adapters are others than before."""
        self.arrays.fill(self._host[0].numpy(), self._host[1].numpy(), batch)
        for device, host in zip(self._device, self._host, strict=True):
            device.copy_(host, non_blocking=True)
        if table is not None and table is not self._source and self._table is not None:
            adapters = table.index.shape[1]
            self._table.index[:, :adapters].copy_(table.index)
            self._table.index[:, adapters:].zero_()  # adapters of a batch before this one have no ranks now
            self._table.scaling[:, :adapters].copy_(table.scaling)
            self._table.numbers[: len(table.numbers)].copy_(table.numbers)
            self._source = table

    def tensors(self) -> list[Tensor]:
        """Its buffers on the device; the pool and the cache are others'."""
        own = [*self._device, self._batch.starts, self._batch.counts, self._batch.decode]
        if self._table is not None:
            own += [self._table.numbers, self._table.index, self._table.columns, self._table.scaling]
        return own

    @torch.no_grad()
    def run(self) -> tuple[Tensor, Tensor]:
        """Output of the last layer [rows, H] and logits [rows, V]."""
        x, calls = self._model.frame.begin(self._ids, self._positions)
        for layer, call in enumerate(calls):
            x = self._model.run_layer(layer, x, call, self)
        return x[0], self._model.logits(x[0])

    # ------------------------------------------------------------------ what the layers' modules ask for

    def stored(self, site: Site) -> Tensor | None:
        return None

    def keep(self, site: Site, product: Tensor) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """q [Hq, rows, D], k, v [Hkv, rows, D] -> [rows, Hq, Dv]"""
        self._cache.write(layer, self._slots, k.transpose(0, 1), v.transpose(0, 1))
        return paged_attention(
            q.transpose(0, 1), self._cache.keys[layer], self._cache.values[layer], self._batch, score.scale,
            sliding_window=score.sliding_window, softcap=score.softcap, sinks=sinks,
        )  # fmt: skip


class DecodeGraphs:
    """All shapes of one engine."""

    def __init__(
        self, model: BaseModel, cache: KVCache, pool: AdapterPool, longest: int,
        capture: Callable[[StaticDecode], Callable[[], tuple[Tensor, Tensor]]] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            longest: tokens of the longest sequence.
            capture: makes a replay of a loaded pass; None captures CUDA graphs.
        """
        self._model, self._cache, self._pool = model, cache, pool
        self._width = min(cache.num_blocks, -(-longest // cache.block_size))
        self._capture = capture or _Captured(model.device)
        self._passes: dict[DecodeShape, StaticDecode] = {}
        self._replays: dict[DecodeShape, Callable[[], tuple[Tensor, Tensor]] | None] = {}
        self._held = 0, 0  # bytes, and at how many shapes they were counted

    @property
    def shapes(self) -> int:
        """How many were met so far, whether they could be captured or not."""
        return len(self._replays)

    def held_bytes(self) -> int:
        """On the device: the buffers of all shapes, and what their graphs keep for themselves."""
        if self._held[1] != self.shapes:
            buffers = (tensor for static in self._passes.values() for tensor in static.tensors())
            graphs = self._capture.held_bytes() if isinstance(self._capture, _Captured) else 0
            self._held = storage_bytes(buffers, self._model.device) + graphs, self.shapes
        return self._held[0]

    def run(self, runs: Sequence[RowRun], ids: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Output of the last layer [rows, H] and logits [rows, V] of runs of one row each; None: not in this way.

        Both are overwritten by the next call.
        """
        adapters = {run.adapter.key: run.adapter for run in runs if run.adapter is not None}
        if any(run.rows != 1 for run in runs) or any(a.pool is not self._pool for a in adapters.values()):
            return None
        table = self._pool.page_table(list(adapters), self._model.layout) if adapters else None
        shape = shape_for(len(runs), table.largest_rank if table else 0, self._width, self._family(runs, len(adapters)))
        if shape is None or self._replays.get(shape, self) is None:
            return None
        numbers = {key: number for number, key in enumerate(adapters)}
        batch = [
            DecodeRow(token, run.context, run.blocks, None if run.adapter is None else numbers[run.adapter.key])
            for run, token in zip(runs, ids, strict=True)
        ]
        return self._replay(shape, batch, table)

    def _family(self, runs: Sequence[RowRun], adapters: int) -> Family:
        if not adapters:
            return Family.GROUPED  # of no launches at all: the base model alone has one graph
        rows, limits = sum(run.adapter is not None for run in runs), self._model.backend.families
        return family_for(rows, adapters, self._pool.flat.dtype, gradients=False, limits=limits)

    def _replay(self, shape: DecodeShape, batch: list[DecodeRow], table: PageTable | None
                ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        if shape not in self._passes:
            try:
                self._passes[shape] = StaticDecode(self._model, self._cache, self._pool, shape)
                self._passes[shape].load(batch, table)
                self._replays[shape] = self._capture(self._passes[shape])
            except (RuntimeError, ValueError) as error:
                if device_lost(error):
                    log.error(
                        "the capture of decode iterations of %s broke off, and CUDA with it: the engine ends", shape
                    )
                    raise
                log.warning("decode iterations of %s cannot be captured: %s", shape, " ".join(str(error).split())[:200])
                self._passes.pop(shape, None)
                self._replays[shape] = None
        if self._replays[shape] is None:
            give_back_memory()  # out here: the exception, and what it held, is gone
            return None
        self._passes[shape].load(batch, table)
        replay = self._replays[shape]
        if replay is None:
            return None
        hidden, logits = replay()
        return hidden[: len(batch)], logits[: len(batch)]


class _Captured:
    """Captures graphs that share their memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)  # the only one: cuBLAS keeps a workspace for every stream it has seen

    def __call__(self, static: StaticDecode) -> Callable[[], tuple[Tensor, Tensor]]:
        here = torch.cuda.current_stream(self._device)
        self._warm_up(static, here)
        graph = torch.cuda.CUDAGraph()
        # A capture that breaks off leaves its own stream the current one; the outer `with` puts that right.
        with torch.cuda.stream(here), torch.cuda.graph(
            graph, pool=self._memory, stream=self._side, capture_error_mode="thread_local"
        ):  # fmt: skip
            results = static.run()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay

    def held_bytes(self) -> int:
        """Of the memory that the graphs share: no other tensor can have it."""
        segments = torch.cuda.memory_snapshot(self._memory)  # type: ignore[no-untyped-call]
        return sum(int(segment["total_size"]) for segment in segments)

    def _warm_up(self, static: StaticDecode, here: torch.cuda.Stream) -> None:
        """Brings every kernel into being, then looks for waits: one inside a capture would cost the CUDA context.

        Raises:
            RuntimeError: the pass waits for the device.
        """
        self._side.wait_stream(here)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(self._side):
                static.run()
                torch.cuda.set_sync_debug_mode("error")
                static.run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            here.wait_stream(self._side)


def _empty_table(model: BaseModel, pool: AdapterPool, shape: DecodeShape) -> PageTable:
    """Room for as many adapters as rows, and for all pages: no page is on two lists."""
    sites, device = len(model.layout), model.device
    widths = tuple(model.layout.values())
    return PageTable(
        flat=pool.flat, page_elements=pool.page_elements,
        numbers=torch.zeros(max(1, pool.room.whole), dtype=torch.int32, device=device),
        index=torch.zeros(sites, shape.rows, 4, dtype=torch.int32, device=device),
        columns=torch.tensor(widths, dtype=torch.int32, device=device),
        scaling=torch.zeros(sites, shape.rows, device=device),
        ranks=((shape.rank,) * shape.rows,) * sites, widths=widths, largest_rank=shape.rank,
    )  # fmt: skip
