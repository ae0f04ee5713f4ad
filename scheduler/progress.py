"""A sweep's progress on paper: the planner moves it forward unit by unit to fill an iteration; and the queue of them.

It may assume nothing about time. It never allows a unit that the sweep's order forbids: forward before head, head
before backward, layers from last to first, no unit across a layer, no new batch of label rows before the last one is
through the head.
"""

from __future__ import annotations

from collections.abc import Iterator

from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Ride, SweepState, Unit
from coserve.scheduler.traits import Traits

PRIORITIES = ("normal", "low")
Stand = tuple[object, ...]


class SweepProgress:
    """What a sweep's state will be after the work planned so far. Counts are tokens (rows) of its stream."""

    __slots__ = (
        "backward_layer",
        "backward_tokens",
        "forward_tokens",
        "head_left",
        "head_partial_rows",
        "head_partial_steps",
        "head_ready",
        "partial_layer",
        "partial_tokens",
        "ridden",
        "sliced",
        "state",
    )

    def __init__(self, state: SweepState) -> None:
        self.state = state
        self.forward_tokens = state.forward_tokens
        self.partial_tokens = state.partial_tokens
        self.partial_layer = state.partial_layer
        self.head_ready = state.head_rows_ready
        self.head_left = state.head_rows_left
        self.head_partial_rows = state.head_partial_rows
        self.head_partial_steps = state.head_partial_steps if state.head_partial_rows else 0
        self.backward_layer = state.backward_layer
        self.backward_tokens = state.backward_tokens
        self.ridden = False
        self.sliced = False

    @property
    def forward_done(self) -> bool:
        return self.forward_tokens >= self.state.stream_tokens

    @property
    def done(self) -> bool:
        return self.forward_done and self.head_left == 0 and (not self.state.backward or self.backward_layer < 0)

    def next_forward(self) -> int:
        """Rows of the next forward window, at its largest; the unfinished window cannot change its size."""
        if self.partial_tokens:
            return self.partial_tokens
        return min(self.state.window, self.state.stream_tokens - self.forward_tokens)

    def can_ride(self) -> bool:
        """A ride runs before all units of the iteration, so no window may be unfinished or planned as a unit."""
        return not (self.forward_done or self.partial_tokens or self.ridden or self.sliced)

    def next_head(self, size: int) -> int:
        """Rows of the head's next batch: `size`, or all that is left; 0 while there are fewer and more will come. An
        unfinished batch comes first and cannot change its size."""
        if self.head_partial_rows:
            return self.head_partial_rows
        if self.head_ready >= size or (self.forward_done and self.head_left):
            return min(size, self.head_ready)
        return 0

    @property
    def head_steps_left(self) -> int:
        """Sub-steps that the unfinished batch, or else a new one, still has to go."""
        return self.state.head_steps - self.head_partial_steps

    def next_backward(self) -> int:
        """Rows of the next backward unit, at its largest; 0 before the head is through and after the last layer."""
        if not self.forward_done or self.head_left or not self.state.backward or self.backward_layer < 0:
            return 0
        return min(self.state.window, self.state.stream_tokens - self.backward_tokens)

    @property
    def rows_before_backward(self) -> int:
        return self.state.stream_tokens - self.backward_tokens

    def ride(self, tokens: int) -> Ride:
        self.ridden = True
        self._forwarded(tokens)
        return Ride(self.state.sweep_id, tokens)

    def forward(self, tokens: int, layers: int) -> ForwardUnit:
        self.sliced = True
        self.partial_layer = (self.partial_layer if self.partial_tokens else 0) + layers
        self.partial_tokens = tokens
        if self.partial_layer >= self.state.layers:
            self.partial_tokens = self.partial_layer = 0
            self._forwarded(tokens)
        return ForwardUnit(self.state.sweep_id, tokens, layers)

    def head(self, rows: int, steps: int) -> HeadUnit:
        self.head_partial_rows = rows
        self.head_partial_steps += steps
        if self.head_partial_steps >= self.state.head_steps:
            self.head_partial_rows = self.head_partial_steps = 0
            self.head_ready -= rows
            self.head_left -= rows
        return HeadUnit(self.state.sweep_id, rows, steps)

    def backward(self, tokens: int) -> BackwardUnit:
        self.backward_tokens += tokens
        if self.backward_tokens >= self.state.stream_tokens:
            self.backward_tokens = 0
            self.backward_layer -= 1
        return BackwardUnit(self.state.sweep_id, tokens)

    def again(self, unit: Unit) -> Unit:
        """A unit that was found for another progress of the same sweep."""
        if isinstance(unit, ForwardUnit):
            return self.forward(unit.tokens, unit.layers)
        if isinstance(unit, HeadUnit):
            return self.head(unit.rows, unit.steps)
        return self.backward(unit.tokens)

    def _forwarded(self, tokens: int) -> None:
        # How many label rows a window holds is not known here; after the last one, all that are left are ready.
        self.forward_tokens += tokens
        if self.forward_done:
            self.head_ready = self.head_left


class SweepQueue:
    """The sweeps of one priority that have work left, in order; each becomes a progress when it is looked at, but for
    the one that has `begun`."""

    def __init__(self, sweeps: tuple[SweepState, ...], priority: str, begun: SweepProgress | None = None) -> None:
        progress = (
            begun if begun is not None and s.sweep_id == begun.state.sweep_id else SweepProgress(s)
            for s in sweeps if priority_of(s) == priority
        )  # fmt: skip
        self._rest = (p for p in progress if not p.done)
        self.first = next(self._rest, None)

    def __iter__(self) -> Iterator[SweepProgress]:
        if self.first is not None:
            yield self.first
            yield from self._rest


def priority_of(sweep: SweepState) -> str:
    """A sweep that carries any normal job is normal."""
    jobs = sweep.jobs
    if len(jobs) == 1:  # every plan asks this of every sweep, and most have one
        return "low" if jobs[0].priority == "low" else "normal"
    return "low" if jobs and all(job.priority == "low" for job in jobs) else "normal"


def stand(sweep: SweepProgress, traits: Traits) -> Stand:
    """Whatever the cost of a sweep's next unit depends on: what is refused one is refused all that stand there."""
    state = sweep.state
    return (
        state.layers, state.window, state.stream_tokens, len(state.jobs), traits.adapters(state), state.head_steps,
        traits.window(sweep.backward_layer) or 0, sweep.forward_tokens,
        sweep.partial_tokens, sweep.partial_layer, sweep.ridden, sweep.sliced, sweep.head_ready, sweep.head_left,
        sweep.head_partial_rows, sweep.head_partial_steps, sweep.backward_tokens,
    )  # fmt: skip
