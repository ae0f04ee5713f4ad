"""The packed forward: one row of tokens through the decoder layers, whatever its tokens are for.

A `PackedPass` is made of parts, each a run of neighbouring rows that knows its adapters and what it attends to:
generation rows over the paged K/V cache, training rows over their sweep's store. Base products see one matrix.
Nothing here samples, plans or differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from coserve.kernels.attention.training import Score
from coserve.server.engine.backend import AdapterRows, Backend
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep
from coserve.server.training.peft.sites import Site


class Part(Protocol):
    """A run of rows [row, row + rows) of a packed pass."""

    rows: int
    keeps_products: bool  # whether `keep_product` does anything

    def adapter_rows(self, row: int) -> list[AdapterRows]:
        """Whose adapters its rows use, where they stand from `row` on."""

    def keep_input(self, layer: int, x: Tensor) -> None:
        """x [rows, H], the input of `layer`."""

    def keep_product(self, site: Site, product: Tensor) -> None:
        """product [rows, out], before the adapters' terms. Called only if the part keeps products."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """q [Hq, rows, D], k, v [Hkv, rows, D] -> [rows, Hq, Dv]"""


class PackedPass:
    """Several parts in one pass, without gradients."""

    def __init__(self, parts: Sequence[Part], backend: Backend) -> None:
        self.parts = [part for part in parts if part.rows]
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + part.rows)
        self._placed = list(zip(self.parts, starts[:-1], starts[1:], strict=True))
        self._keeping = [placed for placed in self._placed if placed[0].keeps_products]
        self.rows = starts[-1]
        self.adapters = backend.adapters([r for part, start, _ in self._placed for r in part.adapter_rows(start)])

    def stored(self, site: Site) -> Tensor | None:
        return None

    def keep(self, site: Site, product: Tensor) -> None:
        for part, start, end in self._keeping:
            part.keep_product(site, product[start:end])

    def keep_input(self, layer: int, x: Tensor) -> None:
        for part, start, end in self._placed:
            part.keep_input(layer, x[start:end])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        outs = [
            part.attend(layer, q[:, start:end], k[:, start:end], v[:, start:end], score, sinks)
            for part, start, end in self._placed
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class SweepPart:
    """Stream rows [start, end) of a sweep going forward."""

    def __init__(self, sweep: Sweep, start: int, end: int, backend: Backend) -> None:
        self.sweep, self.start, self.end = sweep, start, end
        self.rows = end - start
        self.keeps_products = sweep.save and sweep.backward
        spans = sweep.spans(start, end)
        self._first_key = spans[0].first
        lengths = [span.end - span.start for span in spans]
        self._spans = backend.span_rows(start - self._first_key, lengths, sweep.dtype, sweep.device)

    def adapter_rows(self, row: int) -> list[AdapterRows]:
        return self.sweep.adapter_rows(self.start, self.end, row=row)

    def keep_input(self, layer: int, x: Tensor) -> None:
        self.sweep.store.keep_input(layer, self.start, x)

    def keep_product(self, site: Site, product: Tensor) -> None:
        self.sweep.store.keep_product(site, self.start, product)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        store, seen = self.sweep.store, (self._first_key, self.end)
        store.keep_kv(layer, self.start, k, v)
        out, lse = self._spans.forward(q, store.keys(layer, *seen), store.values(layer, *seen), score, sinks)
        if self.keeps_products:
            store.keep_attention(layer, self.start, out, lse)
        return out.transpose(0, 1)


@torch.no_grad()
def run_packed(model: BaseModel, ids: Tensor, positions: Tensor, packed: PackedPass) -> Tensor:
    """ids, positions int64 [T] -> output of the last layer [T, H]; every part has kept what it keeps."""
    x, calls = model.frame.begin(ids, positions)
    for layer, call in enumerate(calls):
        packed.keep_input(layer, x[0])
        x = model.run_layer(layer, x, call, packed)
    return x[0]


@torch.no_grad()
def run_sweep_layers(model: BaseModel, sweep: Sweep, rows: int, layers: int) -> None:
    """Take the sweep's next window, or its unfinished one, `layers` layers further, in a pass of its own.

    `rows` is the size of a new window; an unfinished one keeps its own. The state between two layers is what the
    sweep stores anyway: the input of the next layer.
    """
    start = sweep.forward_rows
    fresh = sweep.partial_rows == 0
    end = start + (rows if fresh else sweep.partial_rows)
    packed = PackedPass([SweepPart(sweep, start, end, model.backend)], model.backend)
    if fresh:
        x, calls = model.frame.begin(sweep.ids[start:end], sweep.positions[start:end])
        packed.keep_input(0, x[0])
        first = 0
    else:
        first = sweep.partial_layer
        x, calls = sweep.store.inputs(first, start, end)[None], model.frame.calls(sweep.positions[start:end])
    last = min(first + layers, model.layer_count)
    for layer in range(first, last):
        x = model.run_layer(layer, x, calls[layer], packed)
        if layer + 1 < model.layer_count:
            packed.keep_input(layer + 1, x[0])
    if last == model.layer_count:
        finish_window(sweep, x[0])
    else:
        sweep.partial_rows, sweep.partial_layer = end - start, last


def finish_window(sweep: Sweep, y: Tensor) -> None:
    """y [T, H]: output of the last layer for the sweep's next T rows."""
    sweep.keep_final(sweep.forward_rows, y)
    sweep.forward_rows += y.shape[0]
    sweep.partial_rows = sweep.partial_layer = 0
