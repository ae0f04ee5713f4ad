"""The generation rows of a packed pass: they write the paged K/V cache and attend over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.attention.plan import AttentionPlan, Segment
from coserve.kernels.attention.reference import paged_attention
from coserve.kernels.attention.training import Score
from coserve.kernels.lora import LoraSegment
from coserve.server.engine.kv_cache import KVCache
from coserve.server.training.peft.sites import Site

PairOf = Callable[[Site], "tuple[Tensor, Tensor, float] | None"]


@dataclass(frozen=True, slots=True)
class RowRun:
    """The newest `rows` tokens of one sequence."""

    rows: int
    context: int  # tokens of the sequence once these have run
    blocks: Sequence[int]  # its block table, long enough for `context`
    pair: PairOf | None = None  # its adapter; None: the base model


class GenerationPart:
    """Rows of several sequences, one run each. Runs of one adapter should be neighbours: they share a product."""

    def __init__(self, runs: Sequence[RowRun], cache: KVCache) -> None:
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
        self._plan = AttentionPlan(segments, size, cache.keys[0].dtype, device)
        positions = [p for run in runs for p in range(run.context - run.rows, run.context)]
        tables = [run.blocks for run in runs for _ in range(run.rows)]
        slots = [blocks[p // size] * size + p % size for blocks, p in zip(tables, positions, strict=True)]
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._adapters = self._neighbours()
        self.adapted, self.keeps_products = bool(self._adapters), False

    def _neighbours(self) -> list[tuple[int, int, PairOf]]:
        """Rows [start, end) of each adapter; neighbouring runs of one adapter together."""
        found: list[tuple[int, int, PairOf]] = []
        for run, start, end in zip(self._runs, self._starts[:-1], self._starts[1:], strict=True):
            if run.pair is None:
                continue
            if found and found[-1][1] == start and found[-1][2] == run.pair:
                found[-1] = (found[-1][0], end, run.pair)
            else:
                found.append((start, end, run.pair))
        return found

    def segments(self, site: Site, row: int) -> list[LoraSegment]:
        found = ((start, end, pair_of(site)) for start, end, pair_of in self._adapters)
        return [LoraSegment(row + start, row + end, *pair) for start, end, pair in found if pair is not None]

    def keep_input(self, layer: int, x: Tensor) -> None:
        return None

    def keep_product(self, site: Site, product: Tensor) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """q [Hq, rows, D], k, v [Hkv, rows, D] -> [rows, Hq, Dv]"""
        cache = self._cache
        cache.write(layer, self._slots, k.transpose(0, 1), v.transpose(0, 1))
        return paged_attention(
            q.transpose(0, 1), cache.keys[layer], cache.values[layer], self._plan, score.scale,
            sliding_window=score.sliding_window, softcap=score.softcap, sinks=sinks,
        )  # fmt: skip
