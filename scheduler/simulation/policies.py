"""Whoever plans iterations: coserve's scheduler and its rivals, all through the same two calls.

Rivals use coserve's scheduler for the serving side (same admission, same prompt chunks), so that a comparison shows
what the rule for training is worth and nothing else. None of them looks at the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.plan_features import plan_features
from coserve.scheduler.policy import Scheduler
from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.state import Plan, Ride, SchedulerState, Unit


class Policy(Protocol):
    def plan(self, state: SchedulerState) -> Plan: ...

    def observe(
        self, plan: Plan, state: SchedulerState, seconds: float, parts: Mapping[int | str, float] | None = None
    ) -> None: ...


class InferenceOnly:
    """Training waits for ever."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.serving = Scheduler(config)

    def plan(self, state: SchedulerState) -> Plan:
        return self._serve(state)

    def _serve(self, state: SchedulerState) -> Plan:
        """Without training. A sweep gets its blocks as soon as they fit beside those of all requests, and keeps them:
        no rival has a rule for memory."""
        plan = self.serving.plan(replace(state, sweeps=()))
        if all(s.placed for s in state.sweeps):
            return plan
        spare = state.free_blocks - sum(
            max(0, -(-r.total_tokens // state.block_size) - r.blocks_held) for r in state.requests
        )
        held = sum(s.blocks for s in state.sweeps if s.placed)
        oldest = next(s for s in state.sweeps if not s.placed)
        fits = oldest.blocks <= min(spare, state.activation_blocks - held)
        return replace(plan, place=(oldest.sweep_id,)) if fits else plan

    def observe(
        self, plan: Plan, state: SchedulerState, seconds: float, parts: Mapping[int | str, float] | None = None
    ) -> None:
        self.serving.observe(plan, state, seconds, parts)


class TemporalSharing(InferenceOnly):
    """After every `frequency` iterations with requests, one whole training step has the device."""

    def __init__(self, config: SchedulerConfig, frequency: int) -> None:
        super().__init__(config)
        self._frequency = frequency
        self._turns = 0

    def plan(self, state: SchedulerState) -> Plan:
        serving = self._serve(state)
        if state.sweeps and (serving.empty or self._turns >= self._frequency):
            self._turns = 0
            units = whole_step(state, self.serving.config)
            if units:
                return Plan(units=units, place=serving.place, adapters=serving.adapters)
        self._turns += not serving.empty
        return serving


class SloLimitedSharing(InferenceOnly):
    """Training has iterations of its own, of whole units, as long as the streams' next tokens are not late for it."""

    def plan(self, state: SchedulerState) -> Plan:
        serving = self._serve(state)
        due = [r.itl_deadline for r in state.requests if r.running and r.itl_deadline is not None]
        due += [r.ttft_deadline for r in state.requests if r.output_tokens == 0]
        slack = min((d - state.now for d in due), default=self.serving.config.itl_seconds) - serving.upper_seconds
        units: list[Unit] = []
        upper = 0.0
        for unit in whole_step(state, self.serving.config):
            plan = Plan(units=(*units, unit))
            upper = self.serving.model.predict(plan_features(plan, state, self.serving.traits))[1]
            if upper > slack and not (serving.empty and not units):
                break
            units.append(unit)
        if not units:
            return serving
        return Plan(
            units=tuple(units), place=serving.place, adapters=serving.adapters, upper_seconds=upper,
            budget_seconds=slack,
        )  # fmt: skip


class StaticBudget(InferenceOnly):
    """A fixed number of tokens an iteration: requests first, the rest is a training window that rides along, or one
    layer's backward of such a window. Time plays no part."""

    def __init__(self, config: SchedulerConfig, tokens: int = 256) -> None:
        super().__init__(replace(config, itl_seconds=1e9, max_chunk=tokens, min_chunk=min(config.min_chunk, tokens)))
        self._tokens, self._head_rows = tokens, config.head_rows

    def plan(self, state: SchedulerState) -> Plan:
        serving = self._serve(state)
        left, prefills = self._tokens - len(serving.decodes), []
        for prefill in serving.prefills:
            if left > 0:
                prefills.append(replace(prefill, tokens=min(left, prefill.tokens)))
                left -= prefills[-1].tokens
        serving = replace(serving, prefills=tuple(prefills))
        oldest = next((s for s in state.sweeps if s.placed), None)
        if oldest is None or left <= 0:
            return serving
        sweep = SweepProgress(oldest)
        if rows := sweep.next_head(self._head_rows):
            return replace(serving, units=(sweep.head(rows, sweep.head_steps_left),))
        if sweep.can_ride():
            return replace(serving, rides=(Ride(oldest.sweep_id, min(left, sweep.next_forward())),))
        if tokens := sweep.next_backward():
            return replace(serving, units=(sweep.backward(min(left, tokens)),))
        return serving


def whole_step(state: SchedulerState, config: SchedulerConfig) -> tuple[Unit, ...]:
    """All units that the oldest sweep still needs, at their full size."""
    oldest = next((s for s in state.sweeps if s.placed), None)
    sweep = SweepProgress(oldest) if oldest is not None else None
    units: list[Unit] = []
    while sweep is not None and not sweep.done:
        if sweep.head_partial_rows or (sweep.forward_done and sweep.head_left):
            units.append(sweep.head(sweep.next_head(config.head_rows), sweep.head_steps_left))
        elif not sweep.forward_done:
            begun = sweep.partial_layer if sweep.partial_tokens else 0
            units.append(sweep.forward(sweep.next_forward(), sweep.state.layers - begun))
        else:
            units.append(sweep.backward(sweep.next_backward()))
    return tuple(units)


def policies(config: SchedulerConfig) -> dict[str, Callable[[], Policy]]:
    """Makers by name, in the order of a table."""
    return {
        "coserve": lambda: Scheduler(config),
        "SLO-limited temporal sharing": lambda: SloLimitedSharing(config),
        "temporal sharing, 64": lambda: TemporalSharing(config, 64),
        "temporal sharing, 128": lambda: TemporalSharing(config, 128),
        "temporal sharing, 512": lambda: TemporalSharing(config, 512),
        "static budget, 256 tokens": lambda: StaticBudget(config),
        "inference only": lambda: InferenceOnly(config),
    }
