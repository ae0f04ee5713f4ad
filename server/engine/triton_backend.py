"""The backend over the Triton kernels: adapters from the pool's pages in shared launches, attention in one launch.

What a pass needs on the device (routing, page table, block tables, tiles) is put there once and used by every layer
and both directions. Imports Triton: for CUDA tensors, or for host tensors under its interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coserve.kernels.attention.batch import PagedBatch, paged_batch
from coserve.kernels.attention.paged import LARGEST_HEAD, paged_attention
from coserve.kernels.attention.plan import Segment
from coserve.kernels.attention.spans import KeySpan, SpanBatch, span_batch
from coserve.kernels.attention.training import Score
from coserve.kernels.attention.varlen import VarlenAttention, varlen_forward
from coserve.kernels.layer.function import gated, rms_norm, rope
from coserve.kernels.lora import (
    LIMITS,
    Family,
    FamilyLimits,
    PagedTerms,
    PageTable,
    Routing,
    RowRange,
    SitePages,
    family_for,
    route,
)
from coserve.kernels.lora.function import paged_lora_add
from coserve.server.engine.backend import AdapterRows, AdapterTerms, PagedRows, SpanRows
from coserve.server.engine.drop_in import LayerFunctions, replace_modules
from coserve.server.engine.linears import LinearGroup, RowsOfPass
from coserve.server.training.peft.sites import Site


class TritonBackend:
    """Stateless."""

    name = "triton"
    captures = True
    largest_head: int | None = LARGEST_HEAD

    def __init__(self, families: FamilyLimits | None = LIMITS) -> None:
        """`families`: where one family of LoRA launches gives way to the other; None: it never does."""
        self.families = families

    def prepare(self, model: Any) -> None:
        """Norms, rotary embeddings and gated activations give way to kernels where these say the same."""
        replace_modules(model, LayerFunctions(rms_norm, rope, gated))

    def adapters(self, rows: Sequence[AdapterRows]) -> AdapterTerms:
        return TritonTerms(rows, self.families)

    def paged_rows(
        self, segments: Sequence[Segment], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> PagedRows:
        return TritonPagedRows(segments, block_size, device)

    def span_rows(self, prefix: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> SpanRows:
        return TritonSpanRows(prefix, lengths, device)


class TritonTerms:
    """Sites that share their input share launches, except where dropout makes their inputs differ."""

    def __init__(self, rows: Sequence[AdapterRows], families: FamilyLimits | None) -> None:
        self._rows = rows
        numbers: dict[str, int] = {}
        self._ranges = [RowRange(r.start, r.end, numbers.setdefault(r.adapter.key, len(numbers))) for r in rows]
        self._keys = list(numbers)
        self._pool = rows[0].adapter.pool if rows else None
        if any(r.adapter.pool is not self._pool for r in rows):
            raise ValueError("the adapters of one pass lie in different pools")
        self._table: PageTable | None = None  # of all sites of the model, once one of them has asked
        self._routing = None
        self._trained = any(r.take_gradient is not None for r in rows)
        self._family = Family.GROUPED
        if self._pool is not None:
            self._routing = route(self._ranges, len(numbers), device=self._pool.device)
            count, dtype = len(self._routing.rows), self._pool.flat.dtype
            self._family = family_for(count, len(numbers), dtype, gradients=self._trained, limits=families)
        self._owners = dict(zip((r.adapter for r in self._ranges), rows, strict=True))
        self._wanted: list[tuple[Sequence[Site], SitePages, tuple[Tensor, ...]]] = []

    def linear(self, group: LinearGroup, x: Tensor, current: RowsOfPass) -> Sequence[Tensor]:
        y = group.product.joined(x, group.stored(current))
        for site, part in zip(group.sites, group.product.split(y), strict=True):
            current.keep(site, part)
        if self._pool is None or self._routing is None:
            return group.product.split(y)
        if self._table is None:
            self._table = self._pool.page_table(self._keys, group.layout)
        table = self._table
        if not any(r.dropout for r in self._rows):
            terms = self._terms(group.sites, table.at(group.first, len(group.sites)))
            return group.product.split(paged_lora_add(y, x, terms, in_place=True))
        return [
            paged_lora_add(part, x, self._terms([site], table.at(group.first + nth)))
            for nth, (site, part) in enumerate(zip(group.sites, group.product.split(y), strict=True))
        ]

    def _terms(self, sites: Sequence[Site], pages: SitePages) -> PagedTerms:
        if self._routing is None:
            raise RuntimeError("a pass without adapters has no terms")
        drops = [r.dropout(sites[0]) if r.dropout else None for r in self._rows]
        leaves = pages.perturbations() if self._trained and pages.max_rank else ()
        if leaves:
            self._wanted.append((sites, pages, leaves))
        return PagedTerms(self._routing, pages, drops if any(drops) else (), leaves, self._family)

    def leaves(self) -> list[Tensor]:
        return [leaf for _, _, leaves in self._wanted for leaf in leaves]

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        following = iter(grads)
        for sites, pages, _ in self._wanted:
            for site, ranks in zip(sites, pages.ranks, strict=True):
                da, db = next(following).split(list(ranks)), next(following).split(list(ranks))
                for number, rows in self._owners.items():
                    if rows.take_gradient is not None and ranks[number]:
                        rows.take_gradient(site, da[number], db[number])


class FixedTerms:
    """Terms whose routing and table are buffers that somebody refills; None: there are none. No gradients."""

    def __init__(self, routing: Routing, table: PageTable | None, family: Family) -> None:
        self._routing, self._table, self._family = routing, table, family

    def linear(self, group: LinearGroup, x: Tensor, current: RowsOfPass) -> Sequence[Tensor]:
        y = group.product.joined(x)
        if self._table is None:
            return group.product.split(y)
        terms = PagedTerms(self._routing, self._table.at(group.first, len(group.sites)), family=self._family)
        return group.product.split(paged_lora_add(y, x, terms, in_place=True))

    def leaves(self) -> list[Tensor]:
        return []

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        return None


class TritonPagedRows:
    """Block tables go to the device once for each grouping of query heads, so once for nearly all models."""

    def __init__(self, segments: Sequence[Segment], block_size: int, device: torch.device) -> None:
        self._segments, self._block_size, self._device = segments, block_size, device
        self._batches: dict[int, PagedBatch] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        group = q.shape[1] // keys.shape[1]
        if group not in self._batches:
            self._batches[group] = paged_batch(self._segments, self._block_size, group, self._device)
        return paged_attention(
            q, keys, values, self._batches[group], score.scale,
            sliding_window=score.sliding_window, softcap=score.softcap, sinks=sinks,
        )  # fmt: skip


class TritonSpanRows:
    """All spans in one launch."""

    def __init__(self, prefix: int, lengths: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._spans: list[KeySpan] = []
        row = 0
        for length in lengths:
            first_key = prefix + row if row else 0
            self._spans.append(KeySpan(row, length, first_key, prefix + row + length - first_key))
            row += length
        self._batches: dict[int, SpanBatch] = {}

    def _batch(self, q: Tensor) -> SpanBatch:
        head_bytes = q.shape[2] * q.element_size()
        if head_bytes not in self._batches:
            self._batches[head_bytes] = span_batch(self._spans, head_bytes, self._device)
        return self._batches[head_bytes]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return varlen_forward(q, k, v, self._batch(q), score, sinks)

    def differentiable(
        self, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, score: Score,
        sinks: Tensor | None, stored: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        if before is not None:
            k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
        return VarlenAttention.apply(q, k, v, self._batch(q), score, sinks, stored)
