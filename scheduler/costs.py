"""What work would cost, by the latency model: the planner asks for hundreds of sizes while it makes one plan.

It may assume that the model learns nothing between `begin` and the end of a plan. It never decides anything.

The model is linear in an iteration's features, and most of what a planner varies enters them along one direction: the
layers of a forward unit, the sub-steps of a head unit, the rows before a backward window, the attention work of a ride.
So one matrix product gives a `Line` for each size in question, and every question after that is a few multiplications.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np

from coserve.scheduler.features import (
    ROW_KNOTS,
    ForwardLoad,
    Vector,
    attention_work,
    backward_line,
    base_vector,
    coarse,
    head_line,
    ride_line,
    slice_line,
)
from coserve.scheduler.latency import LatencyModel, Line
from coserve.scheduler.state import SweepState

Cost = tuple[float, float]  # (mean, upper) seconds
_Pair = tuple[Vector, Vector]  # (what a line starts from, its direction)


class Costs:
    """The latency model's answers, each worked out once a plan.

    `whole` is the full size of such a unit: a smaller one never takes longer, however little is known about it.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self._features: dict[tuple[str, int], _Pair] = {}  # kept for ever: sizes are few
        self._streams = np.array([1, *ROW_KNOTS[1:], 2 * ROW_KNOTS[-1]])
        self._decodes = np.array([base_vector(ForwardLoad(decode_rows=n, logit_rows=n)) for n in self._streams])
        self._contexts = base_vector(ForwardLoad(decode_rows=1, decode_context=1)) - base_vector(ForwardLoad(1))
        self.begin()

    def begin(self) -> None:
        """Forget the answers: the model may have learned since."""
        self._boost = self._model.margins.boost
        self._bases: dict[ForwardLoad, tuple[float, float]] = {}  # (mean, deviation)
        self._lines: dict[tuple[str, int], Line] = {}
        self._backwards: dict[tuple[int, int], Cost] = {}
        self._rides: dict[tuple[int, int], Line] = {}
        self._slices: dict[tuple[int, int, int, int, float, int], tuple[int, int, Cost] | None] = {}
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
        mean, upper = self._at(self._ride_line(load, sweep, rows), attention_work(before, rows) / 1e6)
        return mean, upper + self.margin(load)

    def _ride_line(self, load: ForwardLoad, sweep: SweepState, rows: int) -> Line:
        if load is not self._ridden:
            self._ridden, self._rides = load, {}
        key = (rows, len(sweep.jobs))
        line = self._rides.get(key)
        if line is None:
            fixed, slope = ride_line(load, rows, len(sweep.jobs))
            line = self._rides[key] = self._model.lines(fixed[None], slope[None])[0]
        return line

    def head(self, rows: int, steps: int, of: int, whole: int) -> Cost:
        """`steps` of the `of` sub-steps of a batch of `rows` label rows; `whole` rows are the largest batch."""
        line = self._line("head", rows, head_line)
        cost = self._at(line, steps / of)
        if steps < of:
            cost = _no_more_than(cost, self._at(line, 1.0))
        return cost if rows >= whole else _no_more_than(cost, self._at(self._line("head", whole, head_line), 1.0))

    def backward(self, tokens: int, before: int, whole: int) -> Cost:
        key = (tokens, coarse(before))
        known = self._backwards.get(key)
        if known is None:
            work = attention_work(key[1], tokens) / 1e6
            known = self._at(self._line("backward", tokens, backward_line), work)
            if tokens < whole:
                known = _no_more_than(known, self.backward(whole, before, whole))
            self._backwards[key] = known
        return known

    def slice(self, tokens: int, layers: int, of: int) -> Cost:
        return self._at(self._line("slice", tokens, slice_line), layers / of)

    def largest_ride(
        self, load: ForwardLoad, sweep: SweepState, before: int, sizes: Sequence[int], room: float, which: int
    ) -> tuple[int, Cost] | None:
        """The first of `sizes` with which the packed forward stays within `room` seconds, and what it then costs."""
        margin, boost = (self.margin(load), self._boost) if which else (0.0, 1.0)
        whole = self.ride(load, sweep, before, sizes[0])
        if whole[which] <= room:
            return sizes[0], whole
        self._know_rides(load, sizes, len(sweep.jobs))
        for rows in sizes[1:]:
            line = self._ride_line(load, sweep, rows)
            if (
                boost * (line[0] + attention_work(before, rows) / 1e6 * line[1]) + margin <= room
            ):  # most are refused here
                cost = self.ride(load, sweep, before, rows)
                if cost[which] <= room:
                    return rows, cost
        return None

    def largest_backward(
        self, sizes: Sequence[int], rows_before: int, window: int, left: float, which: int
    ) -> tuple[int, Cost] | None:
        """The first of `sizes` whose unit, the last of `rows_before` rows, takes at most `left` seconds; its cost."""
        boost = self._boost if which else 1.0
        if sizes[0] != sizes[-1] and boost * self._line("backward", sizes[0], backward_line)[0] > left:
            self._know("backward", sizes, backward_line)
        for tokens in sizes:
            if boost * self._line("backward", tokens, backward_line)[0] <= left:  # few come so far
                cost = self.backward(tokens, rows_before - tokens, window)
                if cost[which] <= left:
                    return tokens, cost
        return None

    def largest_slice(
        self, sizes: Sequence[int], todo: int, of: int, left: float, which: int
    ) -> tuple[int, int, Cost] | None:
        """Which of `sizes` through how many of `todo` more layers moves the most rows x layers in `left` seconds, and
        what it costs; of equals the earlier one."""
        key = (sizes[0], len(sizes), todo, of, left, which)
        if key not in self._slices:
            boost = self._boost if which else 1.0
            self._know("slice", sizes, slice_line)
            best, tokens = 0, 0
            for n in sizes:
                line = self._lines["slice", n]
                if n * todo > best and boost * (line[0] + line[1] / of) <= left:
                    depth = self._layers(line, todo, of, left, which)
                    if n * depth > best:
                        best, tokens = n * depth, n
            self._slices[key] = (tokens, best // tokens, self.slice(tokens, best // tokens, of)) if best else None
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

    def _know(self, kind: str, sizes: Sequence[int], make: Callable[[int], _Pair]) -> None:
        """Work out the lines of all `sizes` at once."""
        missing = [n for n in sizes if (kind, n) not in self._lines]
        if missing:
            pairs = [self._pair(kind, n, make) for n in missing]
            lines = self._model.lines(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]))
            self._lines.update(zip(((kind, n) for n in missing), lines, strict=True))

    def _know_rides(self, load: ForwardLoad, sizes: Sequence[int], jobs: int) -> None:
        missing = [(n, jobs) for n in sizes if (n, jobs) not in self._rides]
        if missing:
            pairs = [ride_line(load, *key) for key in missing]
            lines = self._model.lines(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]))
            self._rides.update(zip(missing, lines, strict=True))

    def _pair(self, kind: str, size: int, make: Callable[[int], _Pair]) -> _Pair:
        pair = self._features.get((kind, size))
        if pair is None:
            pair = self._features[kind, size] = make(size)
        return pair

    def _line(self, kind: str, size: int, make: Callable[[int], _Pair]) -> Line:
        line = self._lines.get((kind, size))
        if line is None:
            fixed, slope = self._pair(kind, size, make)
            line = self._lines[kind, size] = self._model.lines(fixed[None], slope[None])[0]
        return line

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
