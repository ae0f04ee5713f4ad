"""What a plan is made of, as vectors of the latency model's features: also of a plan that this scheduler did not make.

It may assume that plan and state fit. It never changes either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coserve.scheduler.features import (
    DECODE,
    GRAPH,
    PREFILL,
    RIDE,
    ForwardLoad,
    Vector,
    adapters_of,
    backward_vector,
    coarse,
    decode_load,
    forward_vector,
    head_vector,
    overhead_vector,
    slice_vector,
)
from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.state import (
    BackwardUnit,
    HeadUnit,
    Plan,
    RequestState,
    SchedulerState,
    SweepState,
    Unit,
)
from coserve.scheduler.traits import Traits

# Rows, and then: of a head unit its share of the sub-steps; of a backward unit the rows before it, its layer's window
# and the size of its adapters; of a forward unit its share of the layers, its attention products and that size.
Shape = tuple[object, ...]


def next_vector(unit: Unit, progress: SweepProgress, traits: Traits, known: dict[Shape, Vector]) -> Vector:
    """What `unit` costs, where its sweep stands now; `progress` moves on. A head unit that asks for more rows or
    sub-steps than there are gets what is left. Units of one shape share a vector, which is kept in `known`."""
    shape: Shape
    if isinstance(unit, HeadUnit):
        rows = progress.head_partial_rows or min(unit.rows, progress.head_left)
        steps = min(unit.steps, progress.head_steps_left)
        progress.head(rows, steps)
        share = steps / progress.state.head_steps
        shape = "head", rows, share
        if shape not in known:
            known[shape] = head_vector(rows, share)
        return known[shape]
    passed = traits.adapters(progress.state)[1]
    if isinstance(unit, BackwardUnit):
        before = coarse(max(0, progress.rows_before_backward - unit.tokens))
        window = traits.window(progress.backward_layer)
        progress.backward(unit.tokens)
        shape = "backward", unit.tokens, before, window, passed
        if shape not in known:
            known[shape] = backward_vector(unit.tokens, before, (window, passed))
        return known[shape]
    before, depth = coarse(progress.forward_tokens), unit.layers / progress.state.layers
    progress.forward(unit.tokens, unit.layers)
    shape = "forward", unit.tokens, before, depth, passed
    if shape not in known:
        known[shape] = slice_vector(unit.tokens, depth, traits.work(before, unit.tokens), passed)
    return known[shape]


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
        if not (forward[DECODE] or forward[GRAPH] or forward[PREFILL]):
            return "alone"
        if self.units or forward[RIDE]:
            return "training"
        return "prompt" if forward[PREFILL] else "decode"

    @property
    def parts(self) -> tuple[Vector, ...]:
        """What is predicted separately: forward and overhead together, then the units."""
        base = self.overhead if self.forward is None else self.overhead + self.forward
        return (base, *self.units)


def plan_load(
    plan: Plan, requests: Mapping[str, RequestState], sweeps: Mapping[int, SweepState], traits: Traits
) -> ForwardLoad:
    """What `plan` puts into the packed forward.

    Raises:
        KeyError: the plan names a request or a sweep that the state does not have.
    """
    decodes = [requests[request_id] for request_id in plan.decodes]
    adapters = adapters_of(decodes)
    load = decode_load(decodes, adapters, traits)
    for prefill in plan.prefills:
        r, tokens = requests[prefill.request_id], prefill.tokens
        size = r.adapter_pages / traits.usual_pages if r.adapter is not None else 0.0
        new = r.adapter is not None and r.adapter not in adapters
        if r.adapter is not None:
            adapters[r.adapter] = r.adapter_pages
        finished = r.computed_tokens + tokens >= r.total_tokens
        work = traits.work(r.computed_tokens, tokens)
        load = load.with_prefill(tokens, work, int(finished), int(new), size if new else 0.0, tokens * size)
    for ride in plan.rides:
        sweep = sweeps[ride.sweep_id]
        load = load.with_ride(sweep, sweep.forward_tokens, ride.tokens, traits)
    return load


def served_requests(plan: Plan, state: SchedulerState) -> dict[str, RequestState]:
    """Those that run in `plan`, by their ids."""
    named = {*plan.decodes, *[p.request_id for p in plan.prefills]}
    return {r.request_id: r for r in state.requests if r.request_id in named}


def plan_features(
    plan: Plan, state: SchedulerState, traits: Traits, requests: Mapping[str, RequestState] | None = None
) -> PlanFeatures:
    """The features of any plan that fits `state`, also of one that this scheduler did not make (calibration).
    `requests`: those served, where they were looked up already."""
    if requests is None:
        requests = served_requests(plan, state)
    sweeps = {s.sweep_id: s for s in state.sweeps}
    load = plan_load(plan, requests, sweeps, traits)
    progress = {u.sweep_id: SweepProgress(sweeps[u.sweep_id]) for u in plan.units}
    for ride in plan.rides:  # which run before all units
        if ride.sweep_id in progress:
            progress[ride.sweep_id].ride(ride.tokens)
    known: dict[Shape, Vector] = {}  # a plan may hold hundreds of units, of a few shapes
    units = tuple(next_vector(unit, progress[unit.sweep_id], traits, known) for unit in plan.units)
    return PlanFeatures(forward_vector(load) if load.rows else None, units, overhead_vector())
