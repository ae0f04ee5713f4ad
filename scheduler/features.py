"""The vectors that the latency model is linear in: one a *part* of an iteration, all in one layout.

A part is the packed forward, one training unit, or the iteration's own overhead; an iteration's vector is the sum of
its parts'. Nothing here knows a second or a coefficient.

Cost over rows is not linear (a product of 5 rows and one of 8 cost the same, one of 17 much more), so rows are written
as fill levels of buckets: with knots k_0 < k_1 < …, entry i is (rows − k_i) / (k_i+1 − k_i) clipped to [0, 1], the last
one unclipped. The model's coefficient of entry i is then the seconds of crossing bucket i: its cost curve is linear
within a bucket, continuous between them and, with coefficients ≥ 0, never falls with rows.

Attention is counted as `Traits` says: products and cached tokens as a mean over the layers, those of a backward unit in
its own layer. An adapter counts by its size: what it adds to a pass is read once and multiplied with each of its rows.
Decode rows that a captured graph runs have a curve of their own, over the rows that the graph has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coserve.scheduler.state import RequestState, SweepState
from coserve.scheduler.traits import Traits, attention_work

Vector = NDArray[np.float64]  # [SIZE]
Matrix = NDArray[np.float64]  # [n, SIZE]

ROW_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HEAD_KNOTS = (1, 4, 16, 64, 256)
UNIT_KNOTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
GRAPH_KNOTS = (1, 4, 16, 64, 256)

# One shared layout. Scales keep every entry near 1 for ordinary loads, so that one prior variance suits all.
FORWARD = 0  # any row at all
ROWS = FORWARD + 1  # buckets of packed rows
LOGITS = ROWS + len(ROW_KNOTS) - 1  # any logit row, then buckets of logit rows
DECODE = LOGITS + len(HEAD_KNOTS)  # any decode, context tokens read by decodes / 4096
PREFILL = DECODE + 2  # any prefill, its attention products / 1e6
RIDE = PREFILL + 2  # any training row, training rows / 128, their attention products / 1e6
ADAPTERS = RIDE + 3  # distinct adapters in the forward / 8, their sizes / 8, rows times the size of their adapter / 128
GRAPH = ADAPTERS + 3  # a replayed graph, then buckets of its rows: in the place of forward, rows, logits and decodes
OVERHEAD = GRAPH + len(GRAPH_KNOTS)  # what an iteration costs outside of its parts
HEAD = OVERHEAD + 1  # a head unit; then, times its share of the batch's sub-steps: 1, buckets of the batch's rows
BACKWARD = HEAD + 1 + len(HEAD_KNOTS)  # a backward unit, buckets of its rows, attention products / 1e6 in its layer,
# rows times adapter sizes / 128, and rows / 128 where the layer's attention has a window
SLICE = BACKWARD + len(UNIT_KNOTS) + 3  # a forward unit; then, times its share of the depth: 1, buckets of its rows,
# attention products / 1e6, rows times adapter sizes / 128
SIZE = SLICE + 1 + len(UNIT_KNOTS) + 2

Kind = tuple[int | None, float]  # of a unit: its layer's attention window, size of the adapters that a row passes


@dataclass(frozen=True, slots=True)
class ForwardLoad:
    """What the packed forward carries, as far as its cost goes. Sizes of adapters are in usual ones."""

    decode_rows: int = 0
    decode_context: float = 0  # sum over decodes of the cached tokens that a layer reads
    prefill_rows: int = 0
    prefill_work: float = 0  # sum over chunks of query × key products
    ride_rows: int = 0
    ride_work: float = 0
    logit_rows: int = 0
    adapters: int = 0  # distinct ones
    adapter_sizes: float = 0.0  # of these
    adapter_rows: float = 0.0  # sum over rows of the size of their adapter
    graph_rows: int = 0  # of the graph that runs the decodes alone; 0: none does, or there are other rows

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows + self.ride_rows

    # Written out: dataclasses.replace takes ten times as long, and a planner asks for dozens of loads.

    def with_prefill(
        self, rows: int, work: float, finished: int, adapters: int, sizes: float = 0.0, adapter_rows: float = 0.0
    ) -> ForwardLoad:
        return ForwardLoad(
            self.decode_rows, self.decode_context, self.prefill_rows + rows, self.prefill_work + work, self.ride_rows,
            self.ride_work, self.logit_rows + finished, self.adapters + adapters, self.adapter_sizes + sizes,
            self.adapter_rows + adapter_rows,
        )  # fmt: skip

    def with_ride(self, sweep: SweepState, before: int, rows: int, traits: Traits) -> ForwardLoad:
        """`rows` rows of `sweep` that come after `before` others of its stream."""
        sizes, passed = traits.adapters(sweep)
        return self.with_ridden(rows, traits.work(before, rows), len(sweep.jobs), sizes, rows * passed)

    def with_ridden(
        self, rows: int, work: float, jobs: int, sizes: float = 0.0, adapter_rows: float = 0.0
    ) -> ForwardLoad:
        return ForwardLoad(
            self.decode_rows, self.decode_context, self.prefill_rows, self.prefill_work, self.ride_rows + rows,
            self.ride_work + work, self.logit_rows, self.adapters + jobs, self.adapter_sizes + sizes,
            self.adapter_rows + adapter_rows,
        )  # fmt: skip


def adapters_of(requests: Iterable[RequestState]) -> dict[str, int]:
    """Their distinct adapters, and the pages of each."""
    return {r.adapter: r.adapter_pages for r in requests if r.adapter is not None}


def decode_load(decodes: Sequence[RequestState], adapters: Mapping[str, int], traits: Traits) -> ForwardLoad:
    """The next tokens of these streams, whose adapters are known, and nothing else."""
    rows = len(decodes)
    passed = sum([r.adapter_pages for r in decodes]) if adapters else 0
    return ForwardLoad(
        decode_rows=rows, decode_context=traits.context([r.total_tokens for r in decodes]), logit_rows=rows,
        adapters=len(adapters), adapter_sizes=sum(adapters.values()) / traits.usual_pages,
        adapter_rows=passed / traits.usual_pages, graph_rows=traits.replayed(rows),
    )  # fmt: skip


def coarse(before: int) -> int:
    """Rows before a backward window, as far as its cost goes: attention's part is small beside the products'."""
    return before - before % 256


def buckets(values: list[float], at: int, knots: Sequence[int], rows: int) -> None:
    """Write the fill levels of `rows` at `values[at:]` (a list: filled entry by entry it is faster than an array)."""
    last = len(knots) - 2
    for i in range(last + 1):
        low = knots[i]
        if rows <= low:
            return
        fill = (rows - low) / (knots[i + 1] - low)
        values[at + i] = fill if fill < 1.0 or i == last else 1.0


def forward_vector(load: ForwardLoad) -> Vector:
    """The packed forward's part; all zeros without rows."""
    return np.array(_forward(load))


def base_vector(load: ForwardLoad) -> Vector:
    """The packed forward and the iteration's overhead."""
    v = _forward(load)
    v[OVERHEAD] = 1.0
    return np.array(v)


def _forward(load: ForwardLoad) -> list[float]:
    v = [0.0] * SIZE
    if load.graph_rows:
        v[GRAPH] = 1.0
        buckets(v, GRAPH + 1, GRAPH_KNOTS, load.graph_rows)
    elif load.rows:
        v[FORWARD] = 1.0
        buckets(v, ROWS, ROW_KNOTS, load.rows)
        if load.logit_rows:
            v[LOGITS] = 1.0
            buckets(v, LOGITS + 1, HEAD_KNOTS, load.logit_rows)
        if load.decode_rows:
            v[DECODE] = 1.0
    v[DECODE + 1] = load.decode_context / 4096.0
    if load.prefill_rows:
        v[PREFILL] = 1.0
        v[PREFILL + 1] = load.prefill_work / 1e6
    if load.ride_rows:
        v[RIDE] = 1.0
        v[RIDE + 1] = load.ride_rows / 128.0
        v[RIDE + 2] = load.ride_work / 1e6
    v[ADAPTERS] = load.adapters / 8.0
    v[ADAPTERS + 1] = load.adapter_sizes / 8.0
    v[ADAPTERS + 2] = load.adapter_rows / 128.0
    return v


def overhead_vector() -> Vector:
    return _unit_vector(OVERHEAD)


def head_lines(sizes: Sequence[int]) -> tuple[int, Matrix]:
    """(a head unit, all sub-steps of a batch of so many label rows)."""
    return HEAD, np.array([_head(rows) for rows in sizes])


def backward_lines(sizes: Sequence[int], kind: Kind) -> tuple[Matrix, int]:
    """(one layer's backward of so many rows, a million attention products of it)."""
    return np.array([_backward(tokens, kind) for tokens in sizes]), BACKWARD + len(UNIT_KNOTS)


def slice_lines(sizes: Sequence[int], products: Sequence[float], passed: float) -> tuple[int, Matrix]:
    """(a forward unit, so many rows through the whole depth). Which of the layers it takes is not told apart: where
    they are of several kinds its attention is that of a layer on average."""
    rows = [_slice(tokens, work, passed) for tokens, work in zip(sizes, products, strict=True)]
    return SLICE, np.array(rows)


def _head(rows: int) -> list[float]:
    v = [0.0] * SIZE
    v[HEAD + 1] = 1.0
    buckets(v, HEAD + 2, HEAD_KNOTS, rows)
    return v


def _backward(tokens: int, kind: Kind) -> list[float]:
    window, passed = kind
    v = [0.0] * SIZE
    v[BACKWARD] = 1.0
    buckets(v, BACKWARD + 1, UNIT_KNOTS, tokens)
    v[BACKWARD + len(UNIT_KNOTS) + 1] = tokens * passed / 128.0
    v[BACKWARD + len(UNIT_KNOTS) + 2] = 0.0 if window is None else tokens / 128.0
    return v


def _slice(tokens: int, products: float, passed: float) -> list[float]:
    v = [0.0] * SIZE
    v[SLICE + 1] = 1.0
    buckets(v, SLICE + 2, UNIT_KNOTS, tokens)
    v[SLICE + 1 + len(UNIT_KNOTS)] = products / 1e6
    v[SLICE + 2 + len(UNIT_KNOTS)] = tokens * passed / 128.0
    return v


def _unit_vector(index: int) -> Vector:
    v = np.zeros(SIZE)
    v[index] = 1.0
    return v


def head_vector(rows: int, share: float) -> Vector:
    """A head unit that takes a batch of `rows` label rows through the share `share` (0 … 1) of its sub-steps."""
    fixed, slope = head_lines((rows,))
    return _unit_vector(fixed) + share * slope[0]


def backward_vector(tokens: int, before: int, kind: Kind = (None, 0.0)) -> Vector:
    """One layer's backward of `tokens` rows with `before` rows ahead of them in the stream."""
    fixed, slope = backward_lines((tokens,), kind)
    return fixed[0] + attention_work(before, tokens, kind[0]) / 1e6 * _unit_vector(slope)


def slice_vector(tokens: int, depth: float, products: float = 0.0, passed: float = 0.0) -> Vector:
    """A forward unit of `tokens` rows over the share `depth` (0 … 1) of the layers; `products`: of attention, in a
    layer on average; `passed`: size of the adapters that a row passes through."""
    fixed, slope = slice_lines((tokens,), (products,), passed)
    return _unit_vector(fixed) + depth * slope[0]
