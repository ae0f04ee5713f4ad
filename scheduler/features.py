"""The vectors that the latency model is linear in: one a *part* of an iteration, all in one layout.

A part is the packed forward, one training unit, or the iteration's own overhead; an iteration's vector is the sum of
its parts'. Nothing here knows a second or a coefficient.

Cost over rows is not linear (a product of 5 rows and one of 8 cost the same, one of 17 much more), so rows are written
as fill levels of buckets: with knots k_0 < k_1 < …, entry i is (rows − k_i) / (k_i+1 − k_i) clipped to [0, 1], the last
one unclipped. The model's coefficient of entry i is then the seconds of crossing bucket i: its cost curve is linear
within a bucket, continuous between them and, with coefficients ≥ 0, never falls with rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.state import (
    BackwardUnit,
    ForwardUnit,
    HeadUnit,
    Plan,
    RequestState,
    SchedulerState,
    SweepState,
    Unit,
)

Vector = NDArray[np.float64]  # [SIZE]
Matrix = NDArray[np.float64]  # [n, SIZE]

ROW_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HEAD_KNOTS = (1, 4, 16, 64, 256)
UNIT_KNOTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)

# One shared layout. Scales keep every entry near 1 for ordinary loads, so that one prior variance suits all.
FORWARD = 0  # any row at all
ROWS = FORWARD + 1  # buckets of packed rows
LOGITS = ROWS + len(ROW_KNOTS) - 1  # any logit row, then buckets of logit rows
DECODE = LOGITS + len(HEAD_KNOTS)  # any decode, context tokens read by decodes / 4096
PREFILL = DECODE + 2  # any prefill, its attention products / 1e6
RIDE = PREFILL + 2  # any training row, training rows / 128, their attention products / 1e6
ADAPTERS = RIDE + 3  # distinct adapters in the forward / 8
OVERHEAD = ADAPTERS + 1  # what an iteration costs outside of its parts
HEAD = OVERHEAD + 1  # a head unit; then, times its share of the batch's sub-steps: 1, buckets of the batch's rows
BACKWARD = HEAD + 1 + len(HEAD_KNOTS)  # a backward unit, buckets of its rows, attention products / 1e6
SLICE = BACKWARD + len(UNIT_KNOTS) + 1  # a forward unit; then, times its share of the depth: 1, buckets of its rows
SIZE = SLICE + 1 + len(UNIT_KNOTS)


@dataclass(frozen=True, slots=True)
class ForwardLoad:
    """What the packed forward carries, as far as its cost goes."""

    decode_rows: int = 0
    decode_context: int = 0  # sum over decodes of the tokens in the cache
    prefill_rows: int = 0
    prefill_work: int = 0  # sum over chunks of query × key products
    ride_rows: int = 0
    ride_work: int = 0
    logit_rows: int = 0
    adapters: int = 0

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows + self.ride_rows

    # Written out: dataclasses.replace takes ten times as long, and a planner asks for dozens of loads.

    def with_prefill(self, rows: int, work: int, finished: int, adapters: int) -> ForwardLoad:
        return ForwardLoad(
            self.decode_rows, self.decode_context, self.prefill_rows + rows, self.prefill_work + work, self.ride_rows,
            self.ride_work, self.logit_rows + finished, self.adapters + adapters,
        )  # fmt: skip

    def with_ride(self, sweep: SweepState, before: int, rows: int) -> ForwardLoad:
        """`rows` rows of `sweep` that come after `before` others of its stream."""
        return self.with_ridden(rows, attention_work(before, rows), len(sweep.jobs))

    def with_ridden(self, rows: int, work: int, jobs: int) -> ForwardLoad:
        return ForwardLoad(
            self.decode_rows, self.decode_context, self.prefill_rows, self.prefill_work, self.ride_rows + rows,
            self.ride_work + work, self.logit_rows, self.adapters + jobs,
        )  # fmt: skip


def attention_work(before: int, rows: int) -> int:
    """Query × key products of `rows` causal rows that come after `before` rows of the same stream."""
    return rows * before + rows * (rows + 1) // 2


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
    if load.rows:
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
    return v


def overhead_vector() -> Vector:
    return _unit_vector(OVERHEAD)


def ride_lines(load: ForwardLoad, sizes: Sequence[int], jobs: int) -> tuple[Matrix, Matrix]:
    """As `base_vector`, once for each of `sizes` rows of a sweep of `jobs` jobs that ride along: (what does not depend
    on their attention products, a million of those)."""
    fixed = np.array([_forward(load.with_ridden(rows, 0, jobs)) for rows in sizes])
    fixed[:, OVERHEAD] = 1.0
    slope = np.zeros_like(fixed)
    slope[:, RIDE + 2] = 1.0
    return fixed, slope


def head_line(rows: int) -> tuple[Vector, Vector]:
    """(a head unit, all sub-steps of a batch of `rows` label rows)."""
    v = [0.0] * SIZE
    v[HEAD + 1] = 1.0
    buckets(v, HEAD + 2, HEAD_KNOTS, rows)
    return _unit_vector(HEAD), np.array(v)


def backward_line(tokens: int) -> tuple[Vector, Vector]:
    """(one layer's backward of `tokens` rows, a million attention products of it)."""
    v = [0.0] * SIZE
    v[BACKWARD] = 1.0
    buckets(v, BACKWARD + 1, UNIT_KNOTS, tokens)
    return np.array(v), _unit_vector(BACKWARD + len(UNIT_KNOTS))


def slice_line(tokens: int) -> tuple[Vector, Vector]:
    """(a forward unit, `tokens` rows through the whole depth)."""
    v = [0.0] * SIZE
    v[SLICE + 1] = 1.0
    buckets(v, SLICE + 2, UNIT_KNOTS, tokens)
    return _unit_vector(SLICE), np.array(v)


def _unit_vector(index: int) -> Vector:
    v = np.zeros(SIZE)
    v[index] = 1.0
    return v


def head_vector(rows: int, share: float) -> Vector:
    """A head unit that takes a batch of `rows` label rows through the share `share` (0 … 1) of its sub-steps."""
    fixed, slope = head_line(rows)
    return fixed + share * slope


def backward_vector(tokens: int, before: int) -> Vector:
    """One layer's backward of `tokens` rows with `before` rows ahead of them in the stream."""
    fixed, slope = backward_line(tokens)
    return fixed + attention_work(before, tokens) / 1e6 * slope


def slice_vector(tokens: int, depth: float) -> Vector:
    """A forward unit of `tokens` rows over the share `depth` (0 … 1) of the layers."""
    fixed, slope = slice_line(tokens)
    return fixed + depth * slope


Shape = tuple[type[Unit], int, float]  # rows; then backward: rows before; else: the share of its layers or sub-steps


def next_shape(unit: Unit, progress: SweepProgress) -> Shape:
    """What the cost of `unit` depends on, where its sweep stands now; `progress` moves on. A head unit that asks for
    more rows or sub-steps than there are gets what is left."""
    if isinstance(unit, HeadUnit):
        rows = progress.head_partial_rows or min(unit.rows, progress.head_left)
        steps = min(unit.steps, progress.head_steps_left)
        progress.head(rows, steps)
        return HeadUnit, rows, steps / progress.state.head_steps
    if isinstance(unit, BackwardUnit):
        before = coarse(max(0, progress.rows_before_backward - unit.tokens))
        progress.backward(unit.tokens)
        return BackwardUnit, unit.tokens, before
    return ForwardUnit, unit.tokens, unit.layers / progress.state.layers


def shape_vector(shape: Shape) -> Vector:
    kind, rows, rest = shape
    if kind is HeadUnit:
        return head_vector(rows, rest)
    if kind is BackwardUnit:
        return backward_vector(rows, int(rest))
    return slice_vector(rows, rest)


@dataclass(frozen=True, slots=True)
class PlanFeatures:
    """A plan's parts as vectors: the forward (None without rows), one a unit, and the iteration's overhead."""

    forward: Vector | None
    units: tuple[Vector, ...]
    overhead: Vector

    @property
    def kind(self) -> str:
        """As far as its scatter goes (`margin.KINDS`)."""
        forward = self.forward if self.forward is not None else self.overhead
        if not (forward[DECODE] or forward[PREFILL]):
            return "alone"
        if self.units or forward[RIDE]:
            return "training"
        return "prompt" if forward[PREFILL] else "decode"

    @property
    def parts(self) -> tuple[Vector, ...]:
        """What is predicted separately: forward and overhead together, then the units."""
        base = self.overhead if self.forward is None else self.overhead + self.forward
        return (base, *self.units)


def plan_load(plan: Plan, requests: Mapping[str, RequestState], sweeps: Mapping[int, SweepState]) -> ForwardLoad:
    """What `plan` puts into the packed forward.

    Raises:
        KeyError: the plan names a request or a sweep that the state does not have.
    """
    decodes = [requests[request_id] for request_id in plan.decodes]
    chunks = [(requests[p.request_id], p.tokens) for p in plan.prefills]
    adapters = {r.adapter for r in decodes} | {r.adapter for r, _ in chunks}
    load = ForwardLoad(
        decode_rows=len(decodes),
        decode_context=sum(r.total_tokens for r in decodes),
        prefill_rows=sum(tokens for _, tokens in chunks),
        prefill_work=sum(attention_work(r.computed_tokens, tokens) for r, tokens in chunks),
        logit_rows=len(decodes) + sum(r.computed_tokens + tokens >= r.total_tokens for r, tokens in chunks),
        adapters=len(adapters - {None}),
    )
    for ride in plan.rides:
        sweep = sweeps[ride.sweep_id]
        load = load.with_ride(sweep, sweep.forward_tokens, ride.tokens)
    return load


def plan_features(plan: Plan, state: SchedulerState) -> PlanFeatures:
    """The features of any plan that fits `state`, also of one that this scheduler did not make (calibration)."""
    named = {*plan.decodes, *(p.request_id for p in plan.prefills)}
    requests = {r.request_id: r for r in state.requests if r.request_id in named}
    sweeps = {s.sweep_id: s for s in state.sweeps}
    load = plan_load(plan, requests, sweeps)
    progress = {u.sweep_id: SweepProgress(sweeps[u.sweep_id]) for u in plan.units}
    units = []
    vectors: dict[Shape, Vector] = {}  # a plan may hold hundreds of units, of a few shapes
    for unit in plan.units:
        shape = next_shape(unit, progress[unit.sweep_id])
        if shape not in vectors:
            vectors[shape] = shape_vector(shape)
        units.append(vectors[shape])
    return PlanFeatures(forward_vector(load) if load.rows else None, tuple(units), overhead_vector())
