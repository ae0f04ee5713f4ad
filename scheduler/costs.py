"""What work would cost, by the latency model: the planner asks for hundreds of sizes while it makes one plan.

It may assume that the model learns nothing between `begin` and the end of a plan. It never decides anything.

The model is linear in an iteration's features, and most of what a planner varies enters them along one direction: the
layers of a forward unit, the sub-steps of a head unit, the rows before a backward window, the attention work of a ride.
So one matrix product gives a `Line` for each size in question, and every question after that is a few multiplications.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import sqrt

import numpy as np

from coserve.scheduler.features import (
    ROW_KNOTS,
    ForwardLoad,
    Matrix,
    Vector,
    attention_work,
    backward_line,
    base_vector,
    coarse,
    head_line,
    ride_lines,
    slice_line,
)
from coserve.scheduler.latency import LatencyModel, Line
from coserve.scheduler.state import SweepState

Cost = tuple[float, float]  # (mean, upper) seconds
_Pair = tuple[Vector, Vector]  # (what a line starts from, its direction)
_Pairs = tuple[Matrix, Matrix]  # the same of several sizes
_MOST_LISTS = 64  # of sizes whose features are kept: most often they are those of a whole window


class Costs:
    """The latency model's answers, each worked out once a plan.

    `whole` is the full size of such a unit: a smaller one never takes longer, however little is known about it.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self._features: dict[tuple[str, tuple[int, ...]], _Pairs] = {}
        self._streams = np.array([1, *ROW_KNOTS[1:], 2 * ROW_KNOTS[-1]])
        self._decodes = np.array([base_vector(ForwardLoad(decode_rows=n, logit_rows=n)) for n in self._streams])
        self._contexts = base_vector(ForwardLoad(decode_rows=1, decode_context=1)) - base_vector(ForwardLoad(1))
        self.begin()

    def begin(self) -> None:
        """Forget the answers: the model may have learned since."""
        self._boost = self._model.margins.boost
        self._bases: dict[ForwardLoad, tuple[float, float]] = {}  # (mean, deviation)
        self._lines: dict[tuple[str, tuple[int, ...]], list[Line]] = {}
        self._heads: dict[tuple[int, int, int], Cost] = {}
        self._backwards: dict[tuple[int, int], Cost] = {}
        self._rides: dict[tuple[tuple[int, ...], int], list[Line]] = {}
        self._slices: dict[tuple[tuple[int, ...], int, int, float, int], tuple[int, int, Cost] | None] = {}
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
        (line,) = self._ride_lines(load, (rows,), len(sweep.jobs))
        mean, upper = self._at(line, attention_work(before, rows) / 1e6)
        return mean, upper + self.margin(load)

    def _ride_lines(self, load: ForwardLoad, sizes: tuple[int, ...], jobs: int) -> list[Line]:
        if load is not self._ridden:
            self._ridden, self._rides = load, {}
        lines = self._rides.get((sizes, jobs))
        if lines is None:
            lines = self._rides[sizes, jobs] = self._model.lines(*ride_lines(load, sizes, jobs))
        return lines

    def head(self, rows: int, steps: int, of: int, whole: int) -> Cost:
        """`steps` of the `of` sub-steps of a batch of `rows` label rows; `whole` rows are the largest batch."""
        known = self._heads.get((rows, steps, of))
        if known is None:
            (line,) = self._lines_of("head", (rows,), head_line)
            known = self._at(line, steps / of)
            if steps < of:
                known = _no_more_than(known, self.head(rows, of, of, whole))
            elif rows < whole:
                known = _no_more_than(known, self.head(whole, of, of, whole))
            self._heads[rows, steps, of] = known
        return known

    def backward(self, tokens: int, before: int, whole: int) -> Cost:
        (line,) = self._lines_of("backward", (tokens,), backward_line)
        return self._backward(line, tokens, before, whole)

    def _backward(self, line: Line, tokens: int, before: int, whole: int) -> Cost:
        key = (tokens, coarse(before))
        known = self._backwards.get(key)
        if known is None:
            known = self._at(line, attention_work(key[1], tokens) / 1e6)
            if tokens < whole:
                known = _no_more_than(known, self.backward(whole, before, whole))
            self._backwards[key] = known
        return known

    def slice(self, tokens: int, layers: int, of: int) -> Cost:
        (line,) = self._lines_of("slice", (tokens,), slice_line)
        return self._at(line, layers / of)

    # Of a long list of sizes most are refused by their mean alone, which is quicker than their upper estimate.

    def largest_ride(
        self, load: ForwardLoad, sweep: SweepState, before: int, sizes: tuple[int, ...], room: float, which: int
    ) -> tuple[int, Cost] | None:
        """The first of `sizes` with which the packed forward stays within `room` seconds, and what it then costs."""
        margin, boost = (self.margin(load), self._boost) if which else (0.0, 1.0)
        (smallest,) = self._ride_lines(load, sizes[-1:], len(sweep.jobs))
        if boost * smallest[0] + margin > room:
            return None
        for rows, line in zip(sizes, self._ride_lines(load, sizes, len(sweep.jobs)), strict=True):
            work = attention_work(before, rows) / 1e6
            if boost * (line[0] + work * line[1]) + margin <= room:
                mean, upper = self._at(line, work)
                cost = mean, upper + self.margin(load)
                if cost[which] <= room:
                    return rows, cost
        return None

    def largest_backward(
        self, sizes: tuple[int, ...], rows_before: int, window: int, left: float, which: int
    ) -> tuple[int, Cost] | None:
        """The first of `sizes` whose unit, the last of `rows_before` rows, takes at most `left` seconds; its cost."""
        boost = self._boost if which else 1.0
        for tokens, line in zip(sizes, self._lines_of("backward", sizes, backward_line), strict=True):
            if boost * line[0] <= left:
                cost = self._backward(line, tokens, rows_before - tokens, window)
                if cost[which] <= left:
                    return tokens, cost
        return None

    def largest_slice(
        self, sizes: tuple[int, ...], todo: int, of: int, left: float, which: int
    ) -> tuple[int, int, Cost] | None:
        """Which of `sizes` through how many of `todo` more layers moves the most rows x layers in `left` seconds, and
        what it costs; of equals the earlier one."""
        key = (sizes, todo, of, left, which)
        if key not in self._slices:
            boost = self._boost if which else 1.0
            best: tuple[int, int, Cost] | None = None
            most_moved = 0
            for n, line in zip(sizes, self._lines_of("slice", sizes, slice_line), strict=True):
                if n * todo > most_moved and boost * (line[0] + line[1] / of) <= left:
                    depth = self._layers(line, todo, of, left, which)
                    if n * depth > most_moved:
                        best, most_moved = (n, depth, self._at(line, depth / of)), n * depth
            self._slices[key] = best
        return self._slices[key]

    def _layers(self, line: Line, todo: int, of: int, left: float, which: int) -> int:
        return most(todo, left, lambda layers: self._at(line, layers / of)[which])

    def decoding(self, context: int) -> Callable[[int], float]:
        """Mean seconds of a decode step by its streams, which have `context` tokens each: a straight line between two
        knots of the rows' buckets, of which the logits' are some."""
        seconds = self._model.means(self._decodes) + self._model.means(self._contexts) * (context * self._streams)
        knots, values = self._streams.tolist(), seconds.tolist()

        def at(streams: int) -> float:
            i = min(max(bisect_right(knots, streams), 1), len(knots) - 1)
            slope = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
            return values[i - 1] + slope * (streams - knots[i - 1])

        return at

    def _lines_of(self, kind: str, sizes: tuple[int, ...], make: Callable[[int], _Pair]) -> list[Line]:
        key = (kind, sizes)
        lines = self._lines.get(key)
        if lines is None:
            pairs = self._features.get(key)
            if pairs is None:
                if len(self._features) >= _MOST_LISTS:
                    self._features.clear()
                fixed, slope = zip(*map(make, sizes), strict=True)
                pairs = self._features[key] = np.array(fixed), np.array(slope)
            lines = self._lines[key] = self._model.lines(*pairs)
        return lines

    def _at(self, line: Line, x: float) -> Cost:
        mean0, mean1, var0, var1, var2 = line
        mean = mean0 + x * mean1
        variance = var0 + x * (var1 + x * var2)
        return mean, self._boost * mean + (sqrt(variance) if variance > 0.0 else 0.0)


def most(todo: int, left: float, seconds: Callable[[int], float]) -> int:
    """How many of `todo` layers or sub-steps fit in `left` seconds; 0 if not even one does. `seconds(n)` of n of them
    must not fall with n."""
    one = seconds(1)
    if one > left:
        return 0
    if todo == 1:
        return 1
    every = seconds(todo)
    if every <= left:
        return todo
    # Nearly a straight line (an upper estimate is a linear mean plus a norm): a few steps from the chord, if any.
    found = max(1, min(todo - 1, 1 + int((left - one) / ((every - one) / (todo - 1)))))
    while found > 1 and seconds(found) > left:
        found -= 1
    while found < todo - 1 and seconds(found + 1) <= left:
        found += 1
    return found


def _kind(load: ForwardLoad) -> str:
    return "training" if load.decode_rows + load.prefill_rows else "alone"


def _no_more_than(cost: Cost, larger: Cost) -> Cost:
    return (cost[0], min(cost[1], larger[1]))
