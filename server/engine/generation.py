"""The generation rows of a packed pass: they write the paged K/V cache and attend over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.attention.plan import Segment
from coserve.kernels.attention.training import Score
from coserve.kernels.transfer import integers
from coserve.server.engine.backend import Adapter, AdapterRows, Backend
from coserve.server.engine.kv_cache import KVCache
from coserve.server.training.peft.sites import Site


@dataclass(frozen=True, slots=True)
class RowRun:
    """The newest `rows` tokens of one sequence."""

    rows: int
    context: int  # tokens of the sequence once these have run
    blocks: Sequence[int]  # its block table, long enough for `context`
    adapter: Adapter | None = None  # None: the base model


class GenerationPart:
    """Rows of several sequences, one run each. Runs of one adapter should be neighbours: they share a product."""

    def __init__(self, runs: Sequence[RowRun], cache: KVCache, backend: Backend) -> None:
        self._cache = cache
        self._runs = list(runs)
        self._starts = [0]
        for run in runs:
            self._starts.append(self._starts[-1] + run.rows)
        self.rows = self._starts[-1]
        size, device = cache.block_size, cache.keys[0].device
        segments = [
            Segment(start, run.rows, run.context, run.blocks)
            for run, start in zip(self._runs, self._starts[:-1], strict=True)
        ]
        self._sequences = backend.paged_rows(segments, size, cache.keys[0].dtype, device)
        positions = [p for run in runs for p in range(run.context - run.rows, run.context)]
        tables = [run.blocks for run in runs for _ in range(run.rows)]
        slots = [blocks[p // size] * size + p % size for blocks, p in zip(tables, positions, strict=True)]
        both = integers([*positions, *slots], device, torch.int64)
        self.positions, self._slots = both[: self.rows], both[self.rows :]
        self.keeps_products = False

    def adapter_rows(self, row: int) -> list[AdapterRows]:
        """Neighbouring runs of one adapter together."""
        found: list[AdapterRows] = []
        for run, start in zip(self._runs, self._starts[:-1], strict=True):
            if run.adapter is None:
                continue
            begin, end = row + start, row + start + run.rows
            if found and found[-1].end == begin and found[-1].adapter is run.adapter:
                begin = found.pop().start
            found.append(AdapterRows(begin, end, run.adapter))
        return found

    def keep_input(self, layer: int, x: Tensor) -> None:
        return None

    def keep_product(self, site: Site, product: Tensor) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """q [Hq, rows, D], k, v [Hkv, rows, D] -> [rows, Hq, Dv]"""
        cache = self._cache
        cache.write(layer, self._slots, k.transpose(0, 1), v.transpose(0, 1))
        return self._sequences.attend(q.transpose(0, 1), cache.keys[layer], cache.values[layer], score, sinks)
