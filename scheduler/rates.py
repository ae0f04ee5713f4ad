"""How fast training advances on this device, in *ideal seconds a second*: measured while there is training.

An ideal second is work that the latency model says takes a second where training has the device to itself and runs in
units of full size. So the rate is at once the share of the device that training gets, what smaller units beside streams
lose, the pauses between steps, and whatever the model is wrong by: a prediction that divides ideal seconds by the rate
is right where the model's error is the same for all of a job's work.

It may assume that it sees every state that is planned for and every plan that was carried out. It never decides what
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from coserve.scheduler.features import ForwardLoad, backward_vector, base_vector, head_vector
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.state import BackwardUnit, ForwardUnit, Plan, SchedulerState, SweepState

_MEMORY = 60.0  # seconds of training after which what was measured counts for a third
_LEAST, _MOST = 0.5, 30.0  # seconds of training that are one measurement; the most where nobody asks for it
_PRIOR = 2.0  # seconds of measuring that the expectation counts for


@dataclass(frozen=True, slots=True)
class WorkShape:
    """What the price of training work depends on."""

    stream: int  # rows that go through the model together
    window: int  # rows of a unit, at most
    layers: int


@dataclass(frozen=True, slots=True)
class Prices:
    """Ideal seconds of one row, and of one row that bears a label."""

    forward: float  # through all layers
    head: float
    backward: float  # through all layers

    def of(self, forward: float, head: float, backward: float) -> float:
        return forward * self.forward + head * self.head + backward * self.backward


def shape_of(sweep: SweepState) -> WorkShape:
    return WorkShape(sweep.stream_tokens, sweep.window, sweep.layers)


def prices(model: LatencyModel, shape: WorkShape, head_rows: int) -> Prices:
    """Of the middle window of a stream; a unit's cost is linear in the rows before it."""
    rows = max(1, min(shape.window, shape.stream))
    before = (max(shape.stream, rows) - rows) // 2
    traits = model.traits
    load = ForwardLoad().with_ridden(rows, traits.work(before, rows), 1, 1.0, rows)
    layer = sum(
        share * float(model.means(backward_vector(rows, before, (window, 1.0)))) for window, share in traits.kinds
    )
    return Prices(
        forward=float(model.means(base_vector(load))) / rows,
        head=float(model.means(head_vector(head_rows, 1.0))) / head_rows,
        backward=shape.layers * layer / rows,
    )


def sweep_seconds(model: LatencyModel, sweep: SweepState, head_rows: int) -> float:
    """Ideal seconds that are left of a sweep."""
    forward = sweep.stream_tokens - sweep.forward_tokens - sweep.partial_tokens * sweep.partial_layer / sweep.layers
    head = sweep.head_rows_left - sweep.head_partial_rows * sweep.head_partial_steps / sweep.head_steps
    backward = 0.0
    if sweep.backward:
        backward = ((sweep.backward_layer + 1) * sweep.stream_tokens - sweep.backward_tokens) / sweep.layers
    return prices(model, shape_of(sweep), head_rows).of(forward, head, backward)


class TrainingRate:
    """Ideal seconds of training a second."""

    def __init__(self, itl_seconds: float, floor_share: float, head_rows: int) -> None:
        self._itl, self._floor, self._head_rows = itl_seconds, floor_share, head_rows
        self._now: float | None = None
        self._trained = self._asked = False  # whether the latest state had sweeps, or else requests
        self._room = 1.0  # share of the time that requests would leave
        self._done = self._time = 0.0  # ideal seconds and seconds, fading
        self._span = self._gap = 0.0  # seconds since then; seconds without a sweep, since the last one was done
        self._rows: dict[WorkShape, list[float]] = {}  # rows done since then: forward, head, backward

    def meet(self, state: SchedulerState, model: LatencyModel) -> None:
        """Time has passed. Its use is told by what there was to run at its beginning."""
        passed = 0.0 if self._now is None else max(0.0, state.now - self._now)
        self._now = state.now
        if self._trained:
            self._span += passed + (self._gap if self._time or self._span else 0.0)
            self._gap = 0.0
        else:
            self._gap += passed
            # An iteration of requests could have been one promise long.
            room = max(self._floor, 1.0 - passed / self._itl) if self._asked else 1.0
            self._room = room + (self._room - room) * exp(-passed / _MEMORY)
        self._trained = bool(state.sweeps)
        self._asked = any(r.running for r in state.requests)
        if self._span >= _MOST:
            self.speed(model)

    def count(self, plan: Plan, state: SchedulerState) -> None:
        """`plan` was carried out, for a state that `meet` was told of: a calibration's is nobody's training."""
        if not (self._trained and (plan.rides or plan.units)):
            return
        sweeps = {s.sweep_id: s for s in state.sweeps}
        for ride in plan.rides:
            self._of(sweeps[ride.sweep_id])[0] += ride.tokens
        for unit in plan.units:
            sweep = sweeps[unit.sweep_id]
            rows = self._of(sweep)
            if isinstance(unit, BackwardUnit):
                rows[2] += unit.tokens / sweep.layers
            elif isinstance(unit, ForwardUnit):
                rows[0] += unit.tokens * unit.layers / sweep.layers
            else:
                rows[1] += unit.rows * unit.steps / sweep.head_steps

    def rest(self) -> None:
        """There is no job any more: the next one finds what requests then leave."""
        self._done = self._time = self._span = self._gap = 0.0
        self._rows.clear()

    def speed(self, model: LatencyModel) -> float:
        """Above 0. Before anything was measured: the share of the time that requests leave."""
        if self._span >= _LEAST:
            ideal = sum(prices(model, shape, self._head_rows).of(*rows) for shape, rows in self._rows.items())
            fade = exp(-self._span / _MEMORY)
            self._done, self._time = self._done * fade + ideal, self._time * fade + self._span
            self._span = 0.0
            self._rows.clear()
        return max(1e-6, (self._done + _PRIOR * self._room) / (self._time + _PRIOR))

    def _of(self, sweep: SweepState) -> list[float]:
        return self._rows.setdefault(shape_of(sweep), [0.0, 0.0, 0.0])
