"""The backend in plain torch: what a CPU runs, and what every kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coserve.kernels.attention.plan import AttentionPlan, Segment
from coserve.kernels.attention.reference import paged_attention
from coserve.kernels.attention.training import Attention, MaskCache, Score, attention_forward
from coserve.kernels.lora import FamilyLimits
from coserve.kernels.lora.reference import LoraSegment, lora_add
from coserve.server.engine.backend import AdapterRows, AdapterTerms, PagedRows, SpanRows
from coserve.server.engine.linears import LinearGroup, RowsOfPass
from coserve.server.training.peft.sites import Site


class PlainBackend:
    """Stateless."""

    name = "torch"
    captures = False
    largest_head: int | None = None
    families: FamilyLimits | None = None

    def prepare(self, model: Any) -> None:
        return None

    def adapters(self, rows: Sequence[AdapterRows]) -> AdapterTerms:
        return PlainTerms(rows)

    def paged_rows(
        self, segments: Sequence[Segment], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> PagedRows:
        return PlainPagedRows(AttentionPlan(segments, block_size, dtype, device))

    def span_rows(self, prefix: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> SpanRows:
        return PlainSpanRows(prefix, lengths, MaskCache(dtype, device))


class PlainTerms:
    """Per site and adapter two small products, with the pair as the pool gives it."""

    def __init__(self, rows: Sequence[AdapterRows]) -> None:
        self._rows = rows
        self._leaves: dict[tuple[int, str], tuple[AdapterRows, Site, Tensor, Tensor, float]] = {}

    def linear(self, group: LinearGroup, x: Tensor, current: RowsOfPass) -> Sequence[Tensor]:
        products = group.product(x, group.stored(current))
        for site, y in zip(group.sites, products, strict=True):
            current.keep(site, y)
        if not self._rows:
            return products
        return [self._add(site, x, y) for site, y in zip(group.sites, products, strict=True)]

    def leaves(self) -> list[Tensor]:
        return [leaf for entry in self._leaves.values() for leaf in entry[2:4]]

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        following = iter(grads)
        for rows, site, *_ in self._leaves.values():
            if rows.take_gradient is not None:
                rows.take_gradient(site, next(following), next(following))

    def _add(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        segments = []
        for rows in self._rows:
            pair = rows.adapter.pair(site) if rows.take_gradient is None else self._leaf_pair(rows, site)
            if pair is not None:
                drop = None if rows.dropout is None else rows.dropout(site)
                segments.append(LoraSegment(rows.start, rows.end, *pair, drop))
        return lora_add(y, x, segments) if segments else y

    def _leaf_pair(self, rows: AdapterRows, site: Site) -> tuple[Tensor, Tensor, float] | None:
        key = (id(rows.adapter), site.name)
        if key not in self._leaves:
            pair = rows.adapter.pair(site)
            if pair is None:
                return None
            a, b, scaling = pair
            self._leaves[key] = (rows, site, a.detach().requires_grad_(), b.detach().requires_grad_(), scaling)
        _, _, a, b, scaling = self._leaves[key]
        return a, b, scaling


class PlainPagedRows:
    def __init__(self, plan: AttentionPlan) -> None:
        self._plan = plan

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        return paged_attention(
            q, keys, values, self._plan, score.scale,
            sliding_window=score.sliding_window, softcap=score.softcap, sinks=sinks,
        )  # fmt: skip


class PlainSpanRows:
    """One call a span."""

    def __init__(self, prefix: int, lengths: Sequence[int], masks: MaskCache) -> None:
        self._masks = masks
        self._spans: list[tuple[slice, int]] = []  # rows of the pass, and how many keys stand before them
        row = 0
        for length in lengths:
            self._spans.append((slice(row, row + length), 0 if row else prefix))
            row += length
        self._prefix = prefix

    def forward(self, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        pieces = []
        for rows, before in self._spans:
            seen = slice(self._prefix + rows.start - before, self._prefix + rows.stop)
            mask = self._masks.get(before, rows.stop - rows.start, score.sliding_window)
            pieces.append(attention_forward(q[:, rows], k[:, seen], v[:, seen], mask, score, sinks))
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([out for out, _ in pieces], 1), torch.cat([lse for _, lse in pieces], 1)

    def differentiable(
        self, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, score: Score,
        sinks: Tensor | None, stored: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        pieces = []
        for rows, prefix in self._spans:
            keys, values = k[:, rows], v[:, rows]
            if prefix and before is not None:
                keys, values = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)
            mask = self._masks.get(prefix, rows.stop - rows.start, score.sliding_window)
            known = None if stored is None else (stored[0][:, rows], stored[1][:, rows])
            pieces.append(Attention.apply(q[:, rows], keys, values, mask, score, sinks, known))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
