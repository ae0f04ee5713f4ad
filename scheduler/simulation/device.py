"""The simulated engine: streams, sweeps, blocks, places and adapters, and what a plan costs.

It carries plans out one at a time and refuses any that breaks a rule: a row that is not there, a block that is not
free, an adapter that is not resident. It knows nothing of how a plan came about, and has no clock but `now`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from coserve.scheduler.features import ForwardLoad
from coserve.scheduler.simulation.cards import Card
from coserve.scheduler.simulation.residency import Residency
from coserve.scheduler.simulation.streams import Stream, Sweep, products, require
from coserve.scheduler.state import (
    BackwardUnit,
    HeadUnit,
    Plan,
    Prefill,
    RequestState,
    SchedulerState,
    TenantLimit,
    Unit,
)

Parts = dict[int | str, float]


@dataclass
class Device:
    """One engine's books and clock. Times in seconds; `slowdown` multiplies whatever runs now."""

    card: Card
    blocks: int = 1024
    block_size: int = 16
    max_running: int = 64
    max_adapters: int = 16
    itl: float = 0.25  # the inter-token promise
    seed: int = 0
    slowdown: float = 1.0
    reserved: int = 0  # blocks that something else has taken
    activation_blocks: int = 1 << 60  # the most that placed sweeps hold together
    now: float = 0.0
    streams: list[Stream] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    done: list[Stream] = field(default_factory=list)
    expired: list[Stream] = field(default_factory=list)
    done_sweeps: list[Sweep] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between tokens of streams that were never preempted
    admissions: list[str] = field(default_factory=list)
    limits: dict[str, TenantLimit] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)  # of adapters that have more than one

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._windows = Counter(self.card.windows or (None,))  # how many layers have each
        self.resident = Residency(self.max_adapters)

    @property
    def free(self) -> int:
        """Blocks of nobody, those of idle adapters among them."""
        adapters = self.resident.blocks(self.used) if self.resident.sizes else 0
        return self.blocks - self.reserved - sum(s.blocks for s in self.streams) - adapters - self.activations

    @property
    def used(self) -> set[str]:
        """Adapters of running requests."""
        return {s.adapter for s in self.streams if s.running and s.adapter is not None}

    @property
    def activations(self) -> int:
        """Blocks that placed sweeps hold."""
        return sum(s.blocks for s in self.sweeps if s.placed)

    def state(self) -> SchedulerState:
        return SchedulerState(
            now=self.now,
            requests=tuple(self._request(s) for s in self.streams),
            sweeps=tuple(s.state() for s in self.sweeps),
            free_blocks=max(0, self.free),
            block_size=self.block_size,
            max_running=self.max_running,
            max_adapters=self.max_adapters,
            limits=self.limits,
            activation_blocks=self.activation_blocks,
            adapter_blocks=self.resident.due,
        )

    def cancel(self, name: str) -> None:
        """End a request, wherever it stands. Idempotent."""
        self.streams = [s for s in self.streams if s.name != name]

    def expire(self, names: tuple[str, ...]) -> None:
        """End those that are past their deadline."""
        for s in [s for s in self.streams if s.name in names]:
            require(s.deadline is not None and s.deadline <= self.now, f"{s.name} is ended before its deadline")
            self.streams.remove(s)
            self.expired.append(s)

    def _request(self, s: Stream) -> RequestState:
        return RequestState(
            request_id=s.name,
            tenant=s.tenant,
            weight=s.weight,
            slo_class=s.slo_class,
            arrived=s.arrived,
            total_tokens=s.total,
            computed_tokens=s.computed,
            output_tokens=s.generated,
            blocks_held=s.blocks,
            adapter=s.adapter,
            adapter_ready=s.adapter is None or s.adapter in self.resident,
            ttft_deadline=s.arrived + s.ttft,
            itl_deadline=None if s.last_token is None else s.last_token + (s.itl or self.itl),
            running=s.running,
            blocks_adapter=self.resident.blocks_of(s.adapter),
            adapter_pages=self._pages(s.adapter),
            adapter_kept_out=s.adapter is not None and s.adapter == self.resident.kept_out,
            most_output=s.most,
            deadline=s.deadline,
        )

    def _pages(self, adapter: str | None) -> int:
        return 0 if adapter is None else self.pages.get(adapter, 1)

    def load_adapter(self, wanted: tuple[str, ...]) -> bool:
        """Load the most urgent missing adapter, evicting idle ones; False if all are there, or if it must wait. Where
        adapters lie in blocks: to be called right before `state`, which tells what it waits for."""
        running, most = sum(s.running for s in self.streams), self.blocks - self.reserved
        return self.resident.load(wanted, self.used, self.free, most, running, self.now)

    # ------------------------------------------------------------------ costs, without noise

    def load(self, plan: Plan) -> ForwardLoad:
        """What `plan` puts into the packed forward, counted from the books."""
        by_name = {s.name: s for s in self.streams}
        sweeps = {s.number: s for s in self.sweeps}
        chunks = [(by_name[p.request_id], p.tokens) for p in plan.prefills]
        decodes = [by_name[name] for name in plan.decodes]
        adapters = {s.adapter for s in decodes} | {s.adapter for s, _ in chunks}
        rides = [(sweeps[r.sweep_id], r.tokens) for r in plan.rides]
        jobs = [job for s, _ in rides for job in s.jobs]
        passed = sum(n * self._pages(s.adapter) for s, n in [*((s, 1) for s in decodes), *chunks])
        return ForwardLoad(
            decode_rows=len(decodes),
            decode_context=self._of_a_layer(lambda w: sum(min(s.total, w or s.total) for s in decodes)),
            prefill_rows=sum(n for _, n in chunks),
            prefill_work=self._of_a_layer(
                lambda w: sum(products(s.computed + n, w) - products(s.computed, w) for s, n in chunks)
            ),
            ride_rows=sum(n for _, n in rides),
            ride_work=self._of_a_layer(lambda w: sum(s.work(s.forwarded + n, n, w) for s, n in rides)),
            logit_rows=len(decodes) + sum(s.computed + n >= s.total for s, n in chunks),
            adapters=len(adapters - {None}) + len(jobs),
            adapter_sizes=sum(self._pages(a) for a in adapters) + sum(job.adapter_pages for job in jobs),
            adapter_rows=passed + sum(n * s.row_pages for s, n in rides),
            graph_rows=0 if chunks or rides else self.card.replayed(len(decodes)),
        )

    def _of_a_layer(self, count: Callable[[int | None], float]) -> float:
        """The mean over the layers of what depends on their windows."""
        return sum(layers * count(window) for window, layers in self._windows.items()) / self._windows.total()

    def forward_seconds(self, plan: Plan) -> float:
        return self.card.forward_seconds(self.load(plan))

    def unit_seconds(self, unit: Unit) -> float:
        """As its sweep stands now."""
        (sweep,) = (s for s in self.sweeps if s.number == unit.sweep_id)
        if isinstance(unit, HeadUnit):
            return self.card.head_seconds(unit.rows, unit.steps)
        if isinstance(unit, BackwardUnit):
            end = sweep.rows - sweep.layer_rows
            window = self.card.windows[sweep.layer] if self.card.windows else None
            return self.card.backward_seconds(
                unit.tokens, sweep.work(end, min(unit.tokens, end), window), sweep.row_pages
            )
        work = self._of_a_layer(lambda w: sweep.work(sweep.forwarded + unit.tokens, unit.tokens, w))
        return self.card.slice_seconds(unit.tokens, unit.layers, work, sweep.row_pages)

    def parts(self, plan: Plan) -> Parts:
        """Seconds of the forward (if it has rows) and of every unit."""
        found: Parts = {i: self.unit_seconds(u) for i, u in enumerate(plan.units)}
        if plan.decodes or plan.prefills or plan.rides:
            found["forward"] = self.forward_seconds(plan)
        return found

    def seconds(self, plan: Plan) -> float:
        return sum(self.parts(plan).values()) + self.card.overhead

    # ------------------------------------------------------------------ carrying out

    def carry_out(self, plan: Plan) -> float:
        """Check and apply `plan`; the clock goes on by the seconds that it took, which are returned."""
        return self.run(plan)[0]

    def run(self, plan: Plan) -> tuple[float, Parts]:
        """As `carry_out`; also the seconds of its parts."""
        self._check_names(plan)
        self.expire(plan.expired)
        late = [s.name for s in self.streams if s.deadline is not None and s.deadline <= self.now]
        require(not late, f"{late} are past their deadline")
        self._preempt(plan.preempt)
        copied = self.move(plan)
        parts = self.parts(plan)
        produced = self._decode(plan.decodes) + self._prefill(plan.prefills)
        self._check_residency()
        self.resident.evict(plan.adapters, self.used, self.free)
        self._train(plan)
        quiet = sum(parts.values()) + self.card.overhead
        seconds = self.disturbed(quiet) * self.slowdown
        self.now += seconds + copied * self.slowdown
        self._deliver(produced)
        self.done_sweeps += [s for s in self.sweeps if s.finished]
        self.sweeps = [s for s in self.sweeps if not s.finished]
        return seconds + copied * self.slowdown, {name: value * seconds / quiet for name, value in parts.items()}

    def disturbed(self, seconds: float) -> float:
        """What an iteration that costs `seconds` takes."""
        return self.card.noise.draw(self.random, seconds)

    def _check_names(self, plan: Plan) -> None:
        named = [*plan.decodes, *(p.request_id for p in plan.prefills), *plan.preempt, *plan.unservable]
        named += plan.expired
        require(len(named) == len(set(named)), "a request is named twice")
        require(not plan.unservable, "a request that fits was called unservable")

    def _preempt(self, names: tuple[str, ...]) -> None:
        for s in [s for s in self.streams if s.name in names]:
            require(s.running, f"{s.name} is preempted and does not run")
            s.lost += s.computed
            s.running, s.blocks, s.computed = False, 0, 0
            s.preemptions += 1

    def move(self, plan: Plan) -> float:
        """Park sweeps, let some fall back, place others. The seconds that it takes."""
        sweeps, copied = {s.number: s for s in self.sweeps}, 0
        for number in plan.park:
            copied += sweeps[number].blocks
            sweeps[number].park(self.now)
        for number in plan.lean:
            sweeps[number].fall_back()
        for number in plan.place:
            copied += sweeps[number].blocks * (sweeps[number].parked is not None)
            sweeps[number].place(self.now)
        require(self.activations <= self.activation_blocks, "training holds more blocks than it may")
        require(self.free >= 0 or not plan.place, "a sweep is placed over the blocks")
        return copied * self.card.copy

    def _decode(self, names: tuple[str, ...]) -> list[Stream]:
        by_name = {s.name: s for s in self.streams}
        for name in names:
            require(by_name[name].decoding, f"{name} is not in decode")
            self._grow(by_name[name], 1)
        return [by_name[name] for name in names]

    def _prefill(self, prefills: tuple[Prefill, ...]) -> list[Stream]:
        by_name = {s.name: s for s in self.streams}
        for p in prefills:
            s = by_name[p.request_id]
            require(not s.decoding, f"{s.name} is in decode")
            require(0 < p.tokens <= s.total - s.computed, f"{s.name} has no {p.tokens} tokens to run")
            if not s.running:
                s.running = True
                require(self.free >= 0, f"the adapter of {s.name} is used over the blocks")
                if s.admitted_at is None:
                    s.admitted_at = self.now
                    self.admissions.append(s.name)
            self._grow(s, p.tokens)
        return [s for s in (by_name[p.request_id] for p in prefills) if s.computed == s.total]

    def _check_residency(self) -> None:
        running = [s for s in self.streams if s.running]
        require(len(running) <= self.max_running, "more requests run than there are places")
        used = self.used
        require(len(used) <= self.max_adapters, "more adapters are used than there are places")
        require(all(a in self.resident for a in used), "an adapter is used that is not resident")
        for tenant, limit in self.limits.items():
            own = [s for s in running if s.tenant == tenant]
            blocks, pages = sum(s.blocks for s in own), len({s.adapter for s in own} - {None})
            require(limit.blocks is None or blocks <= limit.blocks, f"{tenant} holds more blocks than its share")
            require(limit.adapter_pages is None or pages <= max(1, limit.adapter_pages), f"{tenant} uses more pages")
        for a in used:
            self.resident.last_use[a] = self.now

    def _train(self, plan: Plan) -> None:
        sweeps = {s.number: s for s in self.sweeps}
        require(len({r.sweep_id for r in plan.rides}) == len(plan.rides), "two rides of one sweep")
        for ride in plan.rides:
            sweeps[ride.sweep_id].ride(ride.tokens)
        for unit in plan.units:
            sweeps[unit.sweep_id].run(unit)

    def _deliver(self, produced: list[Stream]) -> None:
        for s in produced:
            s.generated += 1
            if s.first_at is None:
                s.first_at = self.now
            if s.last_token is not None and not s.preemptions:
                self.gaps.append(self.now - s.last_token)
            s.last_token = self.now
            if s.finished:
                s.finished_at = self.now
        self.done += [s for s in self.streams if s.finished]
        self.streams = [s for s in self.streams if not s.finished]

    def _grow(self, s: Stream, tokens: int) -> None:
        need = -(-(s.computed + tokens) // self.block_size) - s.blocks
        if need > 0:
            require(need <= self.free, "over the blocks")
            s.blocks += need
        s.computed += tokens
