"""What work would cost, by the latency model: the planner asks for hundreds of sizes while it makes one plan.

It may assume that the model learns nothing between `begin` and the end of a plan. It never decides anything.

The model is linear in an iteration's features, and most of what a planner varies enters them along one direction: the
layers of a forward unit, the sub-steps of a head unit, the rows before a backward window, the attention work of a ride.
So one matrix product gives a `Line` for each size in question, and every question after that is a few multiplications.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from math import sqrt
from typing import Any

import numpy as np

from coserve.scheduler.features import (
    LOGITS,
    RIDE,
    ROW_KNOTS,
    ROWS,
    ForwardLoad,
    Kind,
    Matrix,
    backward_lines,
    base_vector,
    coarse,
    head_lines,
    slice_lines,
)
from coserve.scheduler.latency import LatencyModel, Line
from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.search import how_many
from coserve.scheduler.state import SweepState
from coserve.scheduler.traits import attention_work

Cost = tuple[float, float]  # (mean, upper) seconds
_Pair = tuple[Matrix, int] | tuple[int, Matrix]  # (what lines start from, their directions), as `features` has them
_Family = tuple[Any, ...]  # what makes features, of which sizes (the largest first), and what else they depend on
_MOST_LISTS = 128  # of sizes whose features are kept: most often they are those of a whole window


class Costs:
    """The latency model's answers, each worked out once a plan.

    A smaller unit never takes longer than one of full size, however little is known about it.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self.traits = model.traits
        self._features: dict[_Family, _Pair] = {}
        replayed = self.traits.graph_rows
        self._streams = sorted({1, *ROW_KNOTS, 2 * ROW_KNOTS[-1], *replayed, *(n + 1 for n in replayed[-1:])})
        self._decodes = np.array([base_vector(_streams(n, self.traits.replayed(n))) for n in self._streams])
        self._contexts = base_vector(ForwardLoad(decode_rows=1, decode_context=1)) - base_vector(ForwardLoad(1))
        self.begin()

    def begin(self) -> None:
        """Forget the answers: the model may have learned since."""
        self._boost = self._model.margins.boost
        self._bases: dict[ForwardLoad, tuple[float, float]] = {}  # (mean, deviation)
        self._lines: dict[_Family, list[Line]] = {}
        self._heads: dict[tuple[int, int, int], Cost] = {}
        self._backwards: dict[tuple[int, int, Kind], Cost] = {}
        # Of a sweep, its layer and sizes: what its backward units are like, and the mean of the smallest.
        self._placed: dict[tuple[int, int, tuple[int, ...]], tuple[Kind, float]] = {}
        self._slices: dict[tuple[object, ...], tuple[int, int, Cost] | None] = {}
        self._ridden: ForwardLoad | None = None
        self._most_margin = float("inf")

    def serving(self, load: ForwardLoad) -> Cost:
        """An iteration of `load` alone: the packed forward with the overhead (where only whole iterations are timed,
        their sum is known much better than either)."""
        mean, deviation = self._base(load)
        return mean, self._model.margins.upper("prompt" if load.prefill_rows else "decode", mean, deviation)

    def base(self, load: ForwardLoad) -> Cost:
        """As `serving`, in an iteration that trains as well."""
        mean, deviation = self._base(load)
        return mean, self._boost * mean + deviation + self.margin(load)

    def leave_room(self, load: ForwardLoad, budget: float, share: float) -> None:
        """From here on the margin of training beside `load` takes at most `share` of what `load` leaves of `budget`."""
        mean, _ = self.base(load)
        self._most_margin = max(0.0, share * (budget - self._boost * mean))

    def leave_as_prompts(self) -> None:
        """From here on the margin of training is no larger than that of prompts alone."""
        self._most_margin = self._model.margins.upper("prompt", 0.0, 0.0)

    def margin(self, load: ForwardLoad) -> float:
        """Of `base` and `ride`: the part of their upper estimates that goes to no piece of the work."""
        return min(self._most_margin, self._model.margins.upper(_kind(load), 0.0, 0.0))

    def _base(self, load: ForwardLoad) -> tuple[float, float]:
        known = self._bases.get(load)
        if known is None:
            known = self._bases[load] = self._model.part(base_vector(load))
        return known

    def ride(self, load: ForwardLoad, sweep: SweepState, before: int, rows: int) -> Cost:
        """As `base`, with `rows` rows of `sweep` riding along that come after `before` others of its stream."""
        return self.base(load.with_ride(sweep, before, rows, self.traits))

    def head(self, rows: int, steps: int, of: int, whole: int) -> Cost:
        """`steps` of the `of` sub-steps of a batch of `rows` label rows; `whole` rows are the largest batch."""
        known = self._heads.get((rows, steps, of))
        if known is None:
            (line,) = self._lines_of(head_lines, (rows,))
            known = self._at(line, steps / of)
            if steps < of:
                known = _no_more_than(known, self.head(rows, of, of, whole))
            elif rows < whole:
                known = _no_more_than(known, self.head(whole, of, of, whole))
            self._heads[rows, steps, of] = known
        return known

    def backward(self, sweep: SweepProgress, tokens: int) -> Cost:
        """The unit of its next `tokens` rows, in the layer where it stands."""
        return self._backward(tokens, sweep.rows_before_backward - tokens, sweep.state.window, self._kind(sweep))

    def _backward(self, tokens: int, before: int, whole: int, kind: Kind, line: Line | None = None) -> Cost:
        """`line`: where it is known."""
        before = coarse(before)
        key = tokens, before, kind
        known = self._backwards.get(key)
        if known is None:
            line = line or self._lines_of(backward_lines, (tokens,), kind)[0]
            known = self._at(line, attention_work(before, tokens, kind[0]) / 1e6)
            if tokens < whole:
                known = _no_more_than(known, self._backward(whole, before, whole, kind))
            self._backwards[key] = known
        return known

    def _kind(self, sweep: SweepProgress) -> Kind:
        return self.traits.window(sweep.backward_layer), self.traits.adapters(sweep.state)[1]

    def slice(self, sweep: SweepProgress, tokens: int, layers: int) -> Cost:
        """`layers` layers of the window of its next `tokens` rows, in a pass of its own."""
        (line,) = self._lines_of(*self._slice_family(sweep, (tokens,)))
        return self._at(line, layers / sweep.state.layers)

    def _slice_family(self, sweep: SweepProgress, sizes: tuple[int, ...]) -> _Family:
        return self._slice_features, sizes, coarse(sweep.forward_tokens), self.traits.adapters(sweep.state)[1]

    def _slice_features(self, sizes: tuple[int, ...], before: int, passed: float) -> _Pair:
        return slice_lines(sizes, [self.traits.work(before, n) for n in sizes], passed)

    # Of a long list of sizes most are refused by their mean alone, which is quicker than their upper estimate.

    def largest_ride(
        self, load: ForwardLoad, sweep: SweepState, before: int, sizes: tuple[int, ...], room: float, which: int
    ) -> tuple[int, Cost] | None:
        """The first of `sizes` with which the packed forward stays within `room` seconds, and what it then costs."""
        margin, boost = (self.margin(load), self._boost) if which else (0.0, 1.0)
        if load is not self._ridden:
            self._ridden, self._least_of_rides = load, self._least_ride(load)
        least = self._least_of_rides
        for rows in sizes:
            if boost * least(rows) + margin <= room:
                cost = self.ride(load, sweep, before, rows)
                if cost[which] <= room:
                    return rows, cost
        return None

    def _least_ride(self, load: ForwardLoad) -> Callable[[int], float]:
        """Mean seconds by the rows that ride along, without their attention products and adapters."""
        buckets, (a_ride, a_row) = self._model.prices(ROWS, LOGITS), self._model.prices(RIDE, RIDE + 2)
        crossed = [0.0, *accumulate(buckets)]

        def packed(rows: int) -> float:
            i = min(bisect_right(ROW_KNOTS, rows), len(buckets))
            low, high = ROW_KNOTS[i - 1], ROW_KNOTS[i]
            return crossed[i - 1] + buckets[i - 1] * (rows - low) / (high - low)

        known = self._base(load.with_ridden(0, 0, 0))[0] - packed(max(1, load.rows)) + a_ride * (not load.ride_rows)
        return lambda rows: known + packed(load.rows + rows) + a_row * rows / 128.0

    def largest_backward(
        self, sweep: SweepProgress, sizes: tuple[int, ...], left: float, which: int
    ) -> tuple[int, Cost] | None:
        """The first of `sizes` whose backward unit takes at most `left` seconds; its cost."""
        place = sweep.state.sweep_id, sweep.backward_layer, sizes  # of many units, most often all of the first size
        known = self._placed.get(place)
        if known is None:
            kind = self._kind(sweep)
            known = self._placed[place] = kind, self._least(0.0, backward_lines, sizes, kind)
        kind, least = known
        boost, rows, whole = self._boost if which else 1.0, sweep.rows_before_backward, sweep.state.window
        if boost * least > left:
            return None
        cost = self._backward(sizes[0], rows - sizes[0], whole, kind)
        if cost[which] <= left:
            return sizes[0], cost
        for tokens, line in zip(sizes, self._lines_of(backward_lines, sizes, kind), strict=True):
            if boost * line[0] <= left:
                cost = self._backward(tokens, rows - tokens, whole, kind, line)
                if cost[which] <= left:
                    return tokens, cost
        return None

    def largest_slice(
        self, sweep: SweepProgress, sizes: tuple[int, ...], todo: int, left: float, which: int
    ) -> tuple[int, int, Cost] | None:
        """Which of `sizes` through how many of `todo` more layers moves the most rows x layers in `left` seconds, and
        what it costs; of equals the earlier one."""
        of, family = sweep.state.layers, self._slice_family(sweep, sizes)
        key = *family, todo, of, left, which
        if key not in self._slices:
            boost = self._boost if which else 1.0
            best: tuple[int, int, Cost] | None = None
            most_moved = 0
            fits = boost * self._least(1 / of, *family) <= left
            for n, line in zip(sizes, self._lines_of(*family), strict=True) if fits else ():
                if n * todo > most_moved and boost * (line[0] + line[1] / of) <= left:
                    depth = self._layers(line, todo, of, left, which)
                    if n * depth > most_moved:
                        best, most_moved = (n, depth, self._at(line, depth / of)), n * depth
            self._slices[key] = best
        return self._slices[key]

    def _layers(self, line: Line, todo: int, of: int, left: float, which: int) -> int:
        return how_many(todo, left, lambda layers: self._at(line, layers / of)[which])

    def decoding(self, context: int) -> Callable[[int], float]:
        """Mean seconds of a decode step by its streams, which have `context` tokens each: a straight line between two
        knots of the rows' buckets, of which the logits' are some, or what the graph for so many costs."""
        seconds, a_stream = self._model.means(self._decodes).tolist(), self.traits.context([context])
        a_stream *= float(self._model.means(self._contexts))
        knots, replayed = self._streams, self.traits.replayed if self.traits.graph_rows else None

        def at(streams: int) -> float:
            rows = replayed(streams) or streams if replayed else streams
            i = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
            slope = (seconds[i] - seconds[i - 1]) / (knots[i] - knots[i - 1])
            return seconds[i - 1] + slope * (rows - knots[i - 1]) + a_stream * streams

        return at

    def _lines_of(self, *family: Any) -> list[Line]:
        lines = self._lines.get(family)
        if lines is None:
            lines = self._lines[family] = self._model.lines(*self._made(family))
        return lines

    def _least(self, x: float, *family: Any) -> float:
        """Mean seconds of the last of a family's sizes, which is the smallest, where it grows to `x`."""
        lines = self._lines.get(family)
        if lines is not None:
            return lines[-1][0] + x * lines[-1][1]
        fixed, slope = self._made(family)
        mean = self._model.mean
        return mean(fixed if isinstance(fixed, int) else fixed[-1]) + x * mean(
            slope if isinstance(slope, int) else slope[-1]
        )

    def _made(self, family: _Family) -> _Pair:
        features = self._features.get(family)
        if features is None:
            if len(self._features) >= _MOST_LISTS:
                self._features.clear()
            make, *arguments = family
            features = self._features[family] = make(*arguments)
        return features

    def _at(self, line: Line, x: float) -> Cost:
        mean0, mean1, var0, var1, var2 = line
        mean = mean0 + x * mean1
        variance = var0 + x * (var1 + x * var2)
        return mean, self._boost * mean + (sqrt(variance) if variance > 0.0 else 0.0)


def _kind(load: ForwardLoad) -> str:
    return "training" if load.decode_rows + load.prefill_rows else "alone"


def _streams(rows: int, graph_rows: int) -> ForwardLoad:
    return ForwardLoad(decode_rows=rows, logit_rows=rows, graph_rows=graph_rows)


def _no_more_than(cost: Cost, larger: Cost) -> Cost:
    return (cost[0], min(cost[1], larger[1]))
