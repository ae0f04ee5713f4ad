"""The virtual clock: arrivals, jobs, faults, plans, durations; one engine from the first request to the last second.

It turns the same steps as the engine's loop (intake, plan, prepare, run, observe, deliver) around the simulated
device, and drives any policy through plan and observe alone. The same arguments give the same run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from coserve.scheduler.simulation.calibration import calibrate
from coserve.scheduler.simulation.device import Device
from coserve.scheduler.simulation.faults import Fault, MemoryPressure, Restart, Slowdown
from coserve.scheduler.simulation.ledger import Iteration, Ledger, Setup
from coserve.scheduler.simulation.policies import Policy
from coserve.scheduler.simulation.streams import Stream, Sweep
from coserve.scheduler.simulation.workloads import TrainingJob, Workload
from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Plan, SchedulerState, SweepJob

_IDLE = 0.05  # longest sleep of an engine with nothing to do


def simulate(
    make_policy: Callable[[], Policy],
    setup: Setup,
    workload: Workload,
    jobs: Sequence[TrainingJob] = (),
    *,
    seconds: float,
    seed: int = 0,
    faults: Sequence[Fault] = (),
) -> Ledger:
    """Run one engine for `seconds` of virtual time.

    Raises:
        BrokenPlan: a plan asked for what its state does not allow.
        ValueError: a request is larger than the K/V cache.
    """
    return _Run(make_policy, setup, workload, jobs, seconds, seed, faults).go()


class _Run:
    def __init__(self, make_policy: Callable[[], Policy], setup: Setup, workload: Workload,
                 jobs: Sequence[TrainingJob], seconds: float, seed: int, faults: Sequence[Fault]) -> None:  # fmt: skip
        self.make_policy, self.setup, self.workload, self.seed = make_policy, setup, workload, seed
        self.jobs = [replace(job, done=[], sweep=None, lost=0, ready_at=job.arrives) for job in jobs]
        self.ledger = Ledger(seconds, setup, jobs=self.jobs)
        self.restarts = sorted((f for f in faults if isinstance(f, Restart)), key=lambda f: f.at)
        self.faults = [f for f in faults if not isinstance(f, Restart)]
        self.pages: dict[str, int] = {}  # of all adapters that were asked for
        self.device, self.policy = self._new_engine(0.0)
        self.coming: list[tuple[float, int, Stream]] = []
        self.numbered = 0
        self.sweeps = 0
        self.loading: float | None = None  # when the adapter that is on its way will be there
        for stream in workload.begin():
            self._arrival(stream)

    def _new_engine(self, now: float) -> tuple[Device, Policy]:
        s, life = self.setup, self.ledger.restarts
        device = Device(
            s.card, s.blocks, s.block_size, s.max_running, s.max_adapters, s.itl, self.seed + 1000 * life,
            pages=self.pages,
        )  # fmt: skip
        device.now, device.activation_blocks = now, s.activation_blocks
        policy = self.make_policy()
        calibrate(policy, s.card, s.window, seed=self.seed + 7 + life)
        return device, policy

    def _arrival(self, stream: Stream | None) -> None:
        if stream is None:
            return
        if -(-(stream.prompt + stream.outputs) // self.setup.block_size) > self.setup.blocks:
            raise ValueError(f"{stream.name} needs more K/V blocks than the engine has")
        self.numbered += 1
        if stream.adapter is not None and stream.adapter not in self.pages:
            self.pages[stream.adapter] = self.setup.adapter_pages[len(self.pages) % len(self.setup.adapter_pages)]
        heapq.heappush(self.coming, (stream.arrived, self.numbered, stream))

    def go(self) -> Ledger:
        while self.device.now < self.ledger.seconds:
            if self.restarts and self.restarts[0].at <= self.device.now:
                self._restart(self.restarts.pop(0))
            self._intake()
            state = self.device.state()
            plan = self.policy.plan(state)
            self._expire(plan)
            self._load_adapters(plan)
            if plan.empty and plan.expired:
                continue
            if plan.empty:
                self.device.now += self.device.move(plan)
                self.device.now = min(self.ledger.seconds, self._next_event())
            else:
                self._iteration(plan, state)
        return self.ledger

    # ------------------------------------------------------------------ the steps of the loop

    def _intake(self) -> None:
        device = self.device
        while self.coming and self.coming[0][0] <= device.now:
            stream = heapq.heappop(self.coming)[2]
            device.streams.append(stream)
            self.ledger.streams.append(stream)
        self._disturb()
        # A tenant has one new sweep a priority that waits for memory.
        waiting = [s for s in device.sweeps if not s.placed and s.parked is None]
        held_up = {(job.tenant, job.priority) for sweep in waiting for job in sweep.jobs}
        due = [j for j in self.jobs if j.sweep is None and not j.finished and j.ready_at <= device.now]
        due = [j for j in due if (j.tenant, j.priority) not in held_up]
        while due:
            # A tenant's jobs whose steps fall due together share a sweep; here only where their sequences are alike.
            first = due[0]
            together: list[TrainingJob] = []
            for job in [j for j in due if (j.tenant, j.length, j.labels) == (first.tenant, first.length, first.labels)]:
                if not together or sum(j.rows for j in together) + job.rows <= self.setup.sweep_rows:
                    together.append(job)
                    due.remove(job)
            self._new_sweep(together)

    def _new_sweep(self, jobs: list[TrainingJob]) -> None:
        self.sweeps += 1
        setup, card = self.setup, self.setup.card
        rows = sum(j.rows for j in jobs)
        blocks = ceil(setup.activation * rows / setup.block_size)
        self.device.sweeps.append(
            Sweep(
                self.sweeps, rows, jobs[0].labels, card.layers, setup.window,
                head_steps=card.head_steps, sequence=jobs[0].length,
                blocks=blocks, lean_blocks=ceil(setup.lean * blocks), placed=not blocks,
                unplaced_since=self.device.now if blocks else None,
                jobs=tuple(SweepJob(j.name, j.tenant, j.weight, j.priority, adapter_pages=j.pages) for j in jobs),
            )
        )  # fmt: skip
        for job in jobs:
            job.sweep = self.sweeps

    def _disturb(self) -> None:
        device, now = self.device, self.device.now
        device.slowdown, device.reserved = 1.0, 0
        for fault in self.faults:
            if not fault.at <= now < fault.at + fault.seconds:
                continue
            if isinstance(fault, Slowdown):
                device.slowdown *= fault.factor
            elif isinstance(fault, MemoryPressure):
                held = sum(s.blocks for s in device.streams) + device.activations
                device.reserved = min(int(fault.share * device.blocks), device.blocks - held)
        if any(j.done and j.sweep is None and j.ready_at > now for j in self.jobs):
            device.slowdown *= self.setup.card.optimizer_factor

    def _expire(self, plan: Plan) -> None:
        ended = [s for s in self.device.streams if s.name in plan.expired]
        self.device.expire(plan.expired)
        for stream in ended:
            self._arrival(self.workload.after(stream, self.device.now))

    def _load_adapters(self, plan: Plan) -> None:
        """One at a time, beside the iterations."""
        missing = [a for a in plan.adapters if a not in self.device.resident]
        if missing and self.loading is not None and self.loading <= self.device.now:
            self.device.load_adapter(plan.adapters)
            self.loading = None
            missing = missing[1:]
        if not missing:
            self.loading = None
        elif self.loading is None:
            self.loading = self.device.now + self.setup.adapter_load

    def _next_event(self) -> float:
        now = self.device.now
        times = [now + _IDLE]
        if self.coming:
            times.append(self.coming[0][0])
        if self.loading is not None:
            times.append(self.loading)
        times += [j.ready_at for j in self.jobs if j.sweep is None and not j.finished and j.ready_at > now]
        return max(now + 1e-6, min(times))

    def _iteration(self, plan: Plan, state: SchedulerState) -> None:
        device, ledger = self.device, self.ledger
        began, done, done_sweeps = device.now, len(device.done), len(device.done_sweeps)
        live = {s.name: s for s in device.streams}
        named = [(live[name], 1) for name in plan.decodes] + [(live[p.request_id], p.tokens) for p in plan.prefills]
        before = [s.last_token for s, _ in named]
        trainers = self._trainers(plan)
        without = device.seconds(replace(plan, rides=(), units=())) / device.seconds(plan)  # share of its seconds
        seconds, parts = device.run(plan)
        self.policy.observe(plan, state, seconds, parts)
        for (stream, _), last in zip(named, before, strict=True):
            if last is not None and stream.last_token == device.now:
                ledger.gaps.append((device.now, device.now - last))
        training = seconds * (1.0 - without) if named else seconds
        ledger.iterations.append(
            Iteration(began, seconds, plan.predicted_seconds, plan.upper_seconds, plan.budget_seconds,
                      len(plan.decodes), sum(p.tokens for p in plan.prefills), sum(r.tokens for r in plan.rides),
                      len(plan.units), training, *_trained(plan, device.card.layers, device.card.head_steps))
        )  # fmt: skip
        rows: dict[str, float] = {}
        for stream, count in named:
            rows[stream.tenant] = rows.get(stream.tenant, 0.0) + count
        ledger.charge(0, rows, seconds - training)
        ledger.charge(1, trainers, training)
        for stream in device.done[done:]:
            self._arrival(self.workload.after(stream, device.now))
        for sweep in device.done_sweeps[done_sweeps:]:
            self._step_done(sweep)
        device.now += self.setup.card.gap

    def _trainers(self, plan: Plan) -> dict[str, float]:
        """Tenant -> share of the plan's training, by rides and units."""
        sweeps = {s.number: s for s in self.device.sweeps}
        shares: dict[str, float] = {}
        for number in [r.sweep_id for r in plan.rides] + [u.sweep_id for u in plan.units]:
            for job in sweeps[number].jobs:
                shares[job.tenant] = shares.get(job.tenant, 0.0) + 1.0 / len(sweeps[number].jobs)
        return shares

    def _step_done(self, sweep: Sweep) -> None:
        for job in (j for j in self.jobs if j.sweep == sweep.number):
            job.done.append(self.device.now)
            job.sweep, job.ready_at = None, self.device.now + self.setup.card.optimizer

    def _restart(self, fault: Restart) -> None:
        old = self.device
        self.ledger.restarts += 1
        self.device, self.policy = self._new_engine(old.now + fault.down)
        self.loading = None
        for stream in old.streams:
            if stream.generated:
                stream.cut = True
                self._arrival(self.workload.after(stream, self.device.now))
            else:
                stream.running, stream.computed, stream.blocks = False, 0, 0
                self.device.streams.append(stream)
        for job in (j for j in self.jobs if j.sweep is not None):
            job.sweep, job.ready_at = None, self.device.now
            job.lost += 1


def _trained(plan: Plan, layers: int, head_steps: int) -> tuple[float, float, float]:
    """(forward, head, backward) rows of a plan, parts of a depth or of a batch counting as such."""
    forward = float(sum(r.tokens for r in plan.rides))
    forward += sum(u.tokens * u.layers / layers for u in plan.units if isinstance(u, ForwardUnit))
    head = sum(u.rows * u.steps / head_steps for u in plan.units if isinstance(u, HeadUnit))
    return forward, head, sum(u.tokens / layers for u in plan.units if isinstance(u, BackwardUnit))
