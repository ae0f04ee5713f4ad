"""A little world for the scheduler: requests, sweeps, blocks and a virtual clock, written independently of it.

The world carries plans out and checks every one against rules of its own: blocks, order, unit borders. Its durations
come from a formula that the scheduler's model does not contain, times noise that the test chooses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from coserve.scheduler.state import (
    BackwardUnit,
    ForwardUnit,
    HeadUnit,
    Plan,
    RequestState,
    SchedulerState,
    SweepJob,
    SweepState,
)


@dataclass
class Stream:
    name: str
    arrived: float
    prompt: int
    outputs: int
    slo_class: str = "interactive"
    adapter: str | None = None
    ttft: float = 1.0
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    running: bool = False
    last_token: float | None = None
    admitted_at: float | None = None
    first_at: float | None = None
    preemptions: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.generated

    @property
    def finished(self) -> bool:
        return self.generated >= self.outputs

    @property
    def decoding(self) -> bool:
        return self.running and self.generated > 0 and self.total - self.computed == 1


@dataclass
class Sweep:
    """Label rows are the last `labels` rows of the stream; a batch of them takes `head_steps` sub-steps."""

    number: int
    rows: int
    labels: int
    layers: int = 4
    window: int = 64
    backward: bool = True
    priority: str = "normal"
    forwarded: int = 0
    partial: int = 0
    partial_layer: int = 0
    head_steps: int = 2
    headed: int = 0
    batch: int = 0
    batch_steps: int = 0
    layer: int = field(default=-2)
    layer_rows: int = 0
    forward_cuts: list[int] = field(default_factory=list)
    head_cuts: list[int] = field(default_factory=list)
    head_stops: int = 0
    backward_cuts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layer = self.layers - 1 if self.backward else -1

    @property
    def ready(self) -> int:
        return max(0, self.forwarded - (self.rows - self.labels)) - self.headed

    @property
    def finished(self) -> bool:
        return self.forwarded == self.rows and self.headed == self.labels and self.layer < 0

    def state(self) -> SweepState:
        return SweepState(
            sweep_id=self.number,
            jobs=(SweepJob(f"job-{self.number}", "t", 1.0, self.priority),),
            layers=self.layers,
            stream_tokens=self.rows,
            window=self.window,
            forward_tokens=self.forwarded,
            partial_tokens=self.partial,
            partial_layer=self.partial_layer,
            head_rows_ready=self.ready,
            head_rows_left=self.labels - self.headed,
            head_steps=self.head_steps,
            head_partial_rows=self.batch,
            head_partial_steps=self.batch_steps,
            backward=self.backward,
            backward_layer=self.layer,
            backward_tokens=self.layer_rows,
        )

    def ride(self, tokens: int) -> None:
        assert self.partial == 0, "a ride would overtake an unfinished window"
        assert 0 < tokens <= min(self.window, self.rows - self.forwarded)
        self.forwarded += tokens
        self.forward_cuts.append(tokens)

    def run(self, unit: ForwardUnit | HeadUnit | BackwardUnit) -> None:
        if isinstance(unit, ForwardUnit):
            if self.partial:
                assert unit.tokens == self.partial, "an unfinished window changed its size"
            assert 0 < unit.tokens <= min(self.window, self.rows - self.forwarded)
            self.partial = unit.tokens
            self.partial_layer += unit.layers
            assert unit.layers > 0
            assert self.partial_layer <= self.layers, "a forward unit ran over the last layer"
            if self.partial_layer == self.layers:
                self.forwarded += unit.tokens
                self.forward_cuts.append(unit.tokens)
                self.partial = self.partial_layer = 0
        elif isinstance(unit, HeadUnit):
            if self.batch:
                assert unit.rows == self.batch, "an unfinished batch of label rows changed its size"
            assert 0 < unit.rows <= self.ready, "label rows that are not there"
            assert 0 < unit.steps <= self.head_steps - self.batch_steps, "a head unit ran over its batch's end"
            self.batch = unit.rows
            self.batch_steps += unit.steps
            if self.batch_steps == self.head_steps:
                self.headed += unit.rows
                self.head_cuts.append(unit.rows)
                self.batch = self.batch_steps = 0
            else:
                self.head_stops += 1
        else:
            assert self.forwarded == self.rows and self.headed == self.labels, "backward before forward and head"
            assert self.layer >= 0
            assert 0 < unit.tokens <= self.window
            assert self.layer_rows + unit.tokens <= self.rows, "a backward unit crossed a layer"
            self.layer_rows += unit.tokens
            self.backward_cuts.append((self.layer, unit.tokens))
            if self.layer_rows == self.rows:
                self.layer, self.layer_rows = self.layer - 1, 0


class World:
    """Carries plans out. `seconds(plan)` is the true cost; tests may scale it."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 16,
        max_running: int = 8,
        max_adapters: int = 4,
        itl: float = 0.25,
        noise: float = 0.1,
        seed: int = 0,
        speed: float = 1.0,
    ) -> None:
        self.blocks, self.block_size = blocks, block_size
        self.max_running, self.max_adapters = max_running, max_adapters
        self.itl, self.noise, self.speed = itl, noise, speed
        self.random = random.Random(seed)
        self.now = 0.0
        self.streams: list[Stream] = []
        self.sweeps: list[Sweep] = []
        self.done: list[Stream] = []
        self.done_sweeps: list[Sweep] = []
        self.resident: dict[str, float] = {}  # adapter -> last use
        self.gaps: list[float] = []
        self.admissions: list[str] = []

    @property
    def free(self) -> int:
        return self.blocks - sum(s.blocks for s in self.streams)

    def state(self) -> SchedulerState:
        return SchedulerState(
            now=self.now,
            requests=tuple(
                RequestState(
                    request_id=s.name,
                    tenant="t",
                    weight=1.0,
                    slo_class=s.slo_class,
                    arrived=s.arrived,
                    total_tokens=s.total,
                    computed_tokens=s.computed,
                    output_tokens=s.generated,
                    blocks_held=s.blocks,
                    adapter=s.adapter,
                    adapter_ready=s.adapter is None or s.adapter in self.resident,
                    ttft_deadline=s.arrived + s.ttft,
                    itl_deadline=None if s.last_token is None else s.last_token + self.itl,
                    running=s.running,
                )
                for s in self.streams
            ),
            sweeps=tuple(s.state() for s in self.sweeps),
            free_blocks=self.free,
            block_size=self.block_size,
            max_running=self.max_running,
            max_adapters=self.max_adapters,
        )

    def load_adapter(self, wanted: tuple[str, ...]) -> None:
        """Between iterations: load the most urgent missing adapter, evicting one that is not wanted."""
        assert len(wanted) <= self.max_adapters
        missing = [a for a in wanted if a not in self.resident]
        if not missing:
            return
        if len(self.resident) >= self.max_adapters:
            idle = [a for a in self.resident if a not in wanted]
            assert not {s.adapter for s in self.streams if s.running} & set(idle), "an adapter in use is not wanted"
            del self.resident[min(idle, key=lambda a: self.resident[a])]
        self.resident[missing[0]] = self.now

    def seconds(self, plan: Plan) -> float:
        rows = len(plan.decodes) + sum(p.tokens for p in plan.prefills) + sum(r.tokens for r in plan.rides)
        total = self.forward_seconds(rows)
        for unit in plan.units:
            total += self.unit_seconds(unit)
        return total + 0.001

    def forward_seconds(self, rows: int) -> float:
        return 0.0 if rows == 0 else self.speed * (0.03 + 0.002 * (-(-rows // 16)) * 4 + 0.0004 * rows)

    def unit_seconds(self, unit: ForwardUnit | HeadUnit | BackwardUnit) -> float:
        if isinstance(unit, HeadUnit):
            (steps,) = (s.head_steps for s in self.sweeps if s.number == unit.sweep_id)
            return self.speed * (0.001 + unit.steps / steps * (0.02 + 0.0008 * unit.rows))
        if isinstance(unit, BackwardUnit):
            return self.speed * (0.003 + 0.0003 * unit.tokens)
        return self.speed * (0.001 + 0.25 * unit.layers * (0.03 + 0.0009 * unit.tokens))

    def parts(self, plan: Plan) -> dict[int | str, float]:
        rows = len(plan.decodes) + sum(p.tokens for p in plan.prefills) + sum(r.tokens for r in plan.rides)
        out: dict[int | str, float] = {i: self.unit_seconds(u) for i, u in enumerate(plan.units)}
        if rows:
            out["forward"] = self.forward_seconds(rows)
        return out

    def carry_out(self, plan: Plan) -> float:
        """Check and apply `plan`; returns the seconds it took."""
        by_name = {s.name: s for s in self.streams}
        named = [*plan.decodes, *(p.request_id for p in plan.prefills), *plan.preempt, *plan.unservable]
        assert len(named) == len(set(named)), "a request is named twice"
        assert not plan.unservable, "a request that fits was called unservable"
        for name in plan.preempt:
            s = by_name[name]
            assert s.running
            s.running, s.blocks, s.computed = False, 0, 0
            s.preemptions += 1
        produced: list[Stream] = []
        for name in plan.decodes:
            s = by_name[name]
            assert s.decoding
            self._grow(s, 1)
            produced.append(s)
        for p in plan.prefills:
            s = by_name[p.request_id]
            assert not s.decoding
            assert 0 < p.tokens <= s.total - s.computed
            if not s.running:
                s.running = True
                if s.admitted_at is None:
                    s.admitted_at = self.now
                    self.admissions.append(s.name)
            self._grow(s, p.tokens)
            if s.computed == s.total:
                produced.append(s)
        running = [s for s in self.streams if s.running]
        assert len(running) <= self.max_running
        used = {s.adapter for s in running if s.adapter is not None}
        assert len(used) <= self.max_adapters
        assert used <= set(self.resident)
        for a in used:
            self.resident[a] = self.now
        sweeps = {s.number: s for s in self.sweeps}
        assert len({r.sweep_id for r in plan.rides}) == len(plan.rides), "two rides of one sweep"
        for ride in plan.rides:
            sweeps[ride.sweep_id].ride(ride.tokens)
        for unit in plan.units:
            sweeps[unit.sweep_id].run(unit)
        seconds = self.seconds(plan) * (1.0 + self.noise * self.random.random())
        self.now += seconds
        for s in produced:
            s.generated += 1
            if s.first_at is None:
                s.first_at = self.now
            if s.last_token is not None and not s.preemptions:
                self.gaps.append(self.now - s.last_token)
            s.last_token = self.now
        self.done += [s for s in self.streams if s.finished]
        self.streams = [s for s in self.streams if not s.finished]
        self.done_sweeps += [s for s in self.sweeps if s.finished]
        self.sweeps = [s for s in self.sweeps if not s.finished]
        return seconds

    def _grow(self, s: Stream, tokens: int) -> None:
        need = -(-(s.computed + tokens) // self.block_size) - s.blocks
        if need > 0:
            assert need <= self.free, "over the blocks"
            s.blocks += need
        s.computed += tokens
