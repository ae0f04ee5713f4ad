"""Carries out a plan: one packed forward over decodes, prompt chunks and rides, then the training units.

It may assume that the plan fits the books (blocks, windows, residency). It never decides what runs, except that what
does not fit in memory, or raises, is left out (`relief`): nothing is booked before it is whole, so the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coserve.kernels.transfer import integers
from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Plan, Unit
from coserve.server.engine.adapters import AdapterBook
from coserve.server.engine.backward import run_backward_unit
from coserve.server.engine.containment import attempt
from coserve.server.engine.cores import CoreSharing
from coserve.server.engine.forward import PackedPass, SweepPart, finish_window, run_packed, run_sweep_layers
from coserve.server.engine.generation import GenerationPart, RowRun
from coserve.server.engine.head import run_head_unit
from coserve.server.engine.iterations import Work
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.model import BaseModel
from coserve.server.engine.readings import PendingReadings, Reading
from coserve.server.engine.relief import Load, Relief, apart, smaller
from coserve.server.engine.requests import Request, RequestBook
from coserve.server.engine.sampler import Sampled
from coserve.server.engine.stopwatch import Stopwatch
from coserve.server.engine.sweep import Sweep
from coserve.server.training.fault import INTERNAL, OUT_OF_MEMORY, Fault

if TYPE_CHECKING:
    from coserve.server.engine.decode_graphs import DecodeGraphs

YIELDED = Fault("yielded", "generation needed the memory")
_NOT_FINITE = "the adapter makes the model's values infinite or not a number; train it again with a lower learning rate"


@dataclass(slots=True)
class Outcome:
    """What an iteration brought."""

    sampled: list[tuple[Request, Sampled]] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    parts: dict[int | str, float] = field(default_factory=dict)  # seconds: "forward", and by index in plan.units
    failed: dict[str, Fault] = field(default_factory=dict)  # requests that end here
    lost: dict[int, Fault] = field(default_factory=dict)  # sweeps that hold nothing any more: their steps begin anew
    units: int = 0  # of the plan, that were worked through; the others were better left for later
    disturbed: bool = False  # something did not run as planned: the seconds say nothing of the plan
    captured: bool = False  # a graph was made on the way: neither do they


@dataclass(slots=True)
class Flight:
    """An iteration whose work is all queued."""

    plan: Plan
    rows: dict[str, int]  # of requests, by id, that are still to be read
    outcome: Outcome
    watch: Stopwatch


class Runner:
    """Runs plans on one model and cache, one at a time.

    `ahead`: `launch` leaves what generation said on the device, and the host is free until `finish`. Without it, all
    that there is to do is done when `launch` returns.
    """

    def __init__(
        self, model: BaseModel, cache: KVCache, requests: RequestBook, adapters: AdapterBook,
        cores: CoreSharing | None = None, graphs: DecodeGraphs | None = None, ahead: bool | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`ahead`: None is as the device does, which on CUDA works on by itself. `asked`: whether a request has come
        meanwhile: then the training units that have not begun are left to later iterations. So they are, without
        `ahead`, when the iteration is too late for them."""
        self.model, self._cache, self._cores = model, cache, cores
        self._requests, self._adapters, self._graphs = requests, adapters, graphs
        self.ahead = model.device.type == "cuda" if ahead is None else ahead
        self._asked = asked
        self._pending: list[PendingReadings] = []

    def run(self, plan: Plan, sweeps: Mapping[int, Sweep]) -> Outcome:
        """`launch` and `finish`."""
        return self.finish(self.launch(plan, sweeps))

    def launch(self, plan: Plan, sweeps: Mapping[int, Sweep]) -> Flight:
        """Queue the work of an iteration. Requests of the plan must be admitted (hold `SequenceBlocks`), and books must
        stay as they are until it is finished.

        Raises only what leaves nothing to go on with: the device is lost, or the books contradict each other.
        """
        if self._cores is not None:
            self._cores.adjust()
        outcome, watch = Outcome(), Stopwatch(self.model.device)
        shapes = self._graphs.shapes if self._graphs is not None else 0
        # A sweep whose memory could not be put in place is gone before its rows run.
        rides = tuple(ride for ride in plan.rides if ride.sweep_id in sweeps)
        outcome.disturbed = len(rides) < len(plan.rides) or any(unit.sweep_id not in sweeps for unit in plan.units)
        loads = [Load(plan.decodes, plan.prefills, rides)]
        while loads:
            loads[:1] = self._forward_or_relief(loads[0], sweeps, outcome)
        watch.mark("forward")
        for index, unit in enumerate(plan.units):
            if not self.ahead and self._better_later(plan, index, watch):
                break
            outcome.units += 1
            if unit.sweep_id in sweeps and unit.sweep_id not in outcome.lost:
                self._unit_or_loss(unit, sweeps[unit.sweep_id], outcome)
            watch.mark(index)
        outcome.captured = self._graphs is not None and self._graphs.shapes > shapes
        rows = {request.id: count for pending in self._pending for request, count in pending.scheduled}
        return Flight(plan, rows, outcome, watch)

    def _better_later(self, plan: Plan, index: int, watch: Stopwatch) -> bool:
        """Whether a prompt has come, or streams would wait longer than they were promised, for units that can as well
        run in the next iteration."""
        late = index < len(plan.unit_starts) and watch.passed > plan.unit_starts[index]
        return late or (index > 0 and self._asked())

    def finish(self, flight: Flight) -> Outcome:
        """Wait for what was launched and commit what ran to its requests. Raises as `launch` does."""
        plan, outcome = flight.plan, flight.outcome
        self._take_pending(outcome)
        outcome.parts = flight.watch.parts()
        if not (plan.decodes or plan.prefills or plan.rides):
            outcome.parts.pop("forward", None)
        return outcome

    # ------------------------------------------------------------------ the packed forward

    def _forward_or_relief(self, load: Load, sweeps: Mapping[int, Sweep], outcome: Outcome) -> tuple[Load, ...]:
        """Runs a load; if that fails, gives up what `relief` says. Returns the loads to run instead."""
        fault = attempt("a packed forward", lambda: self._forward(load, sweeps, outcome))
        if fault is None:
            return ()
        outcome.disturbed = True
        if load.rides:
            self._lose({ride.sweep_id: sweeps[ride.sweep_id] for ride in load.rides}, fault, outcome)
            return (Load(load.decodes, load.prefills),)
        if fault.code != OUT_OF_MEMORY:
            return self._relieve(apart(load), fault, outcome)
        held = {sweep_id: sweep for sweep_id, sweep in sweeps.items() if sweep.holds_memory}
        if held:
            self._lose(held, YIELDED, outcome)
            return (load,)
        return self._relieve(smaller(load), fault, outcome)

    def _relieve(self, relief: Relief, fault: Fault, outcome: Outcome) -> tuple[Load, ...]:
        if relief.failed is not None:
            outcome.failed[relief.failed] = fault
        if relief.halved is not None:
            request = self._requests.get(relief.halved.request_id)
            if request is not None:
                request.chunk = relief.halved.tokens
        return tuple(load for load in relief.loads if not load.empty)

    @staticmethod
    def _lose(sweeps: Mapping[int, Sweep], fault: Fault, outcome: Outcome) -> None:
        outcome.disturbed = True
        for sweep_id, sweep in sweeps.items():
            sweep.release()
            outcome.lost.setdefault(sweep_id, fault)

    def _forward(self, load: Load, sweeps: Mapping[int, Sweep], outcome: Outcome) -> None:
        """Books nothing unless the whole pass is through, and then each sweep's rows and each request's by itself."""
        scheduled = self._scheduled(load)
        rides = [(sweeps[ride.sweep_id], ride.tokens) for ride in load.rides]
        if not scheduled and not rides:
            return
        runs = [self._row_run(request, rows) for request, rows in scheduled]
        parts = [SweepPart(s, s.forward_rows, s.forward_rows + rows, self.model.backend) for s, rows in rides]
        hidden, logits = self._through_the_layers(runs, self._token_ids(scheduled), parts)
        generated = sum(run.rows for run in runs)
        pending = PendingReadings(self.model, scheduled, hidden[:generated]) if scheduled else None
        if pending is not None:
            pending.begin(logits)
        readings = [] if pending is None or self.ahead else pending.take()
        row = generated
        for ride, part in zip(load.rides, parts, strict=True):
            self._finish_ride(ride.sweep_id, part, hidden[row : row + part.rows], outcome)
            row += part.rows
        for reading in readings:
            self._commit(reading, outcome)
        if pending is not None and self.ahead:
            self._pending.append(pending)

    def _through_the_layers(
        self, runs: list[RowRun], ids: list[int], parts: list[SweepPart]
    ) -> tuple[Tensor, Tensor | None]:
        """Output of the last layer [rows, H], and the logits [rows, V] where they came with it."""
        # What a graph says lies where the next replay says it: one an iteration, which is read at the end.
        if self._graphs is not None and not parts and not self._pending:
            known = self._graphs.run(runs, ids)
            if known is not None:
                return known
        backend = self.model.backend
        generation = GenerationPart(runs, self._cache, backend)
        all_ids = [integers(ids, self.model.device, torch.int64)]
        all_ids += [part.sweep.ids[part.start : part.end] for part in parts]
        positions = [generation.positions] + [part.sweep.positions[part.start : part.end] for part in parts]
        packed = PackedPass([generation, *parts], backend)
        return run_packed(self.model, torch.cat(all_ids), torch.cat(positions), packed), None

    def _finish_ride(self, sweep_id: int, part: SweepPart, hidden: Tensor, outcome: Outcome) -> None:
        """hidden [rows, H] of a sweep's window."""
        fault = attempt("a training window", lambda: finish_window(part.sweep, hidden))
        if fault is not None:
            self._lose({sweep_id: part.sweep}, fault, outcome)
            return
        outcome.work.train_forward += part.rows
        outcome.work.adapters.update(f"job:{step.job_id}" for step in part.sweep.steps)

    def _scheduled(self, load: Load) -> list[tuple[Request, int]]:
        """(request, rows), neighbours by adapter."""
        wanted = [(request_id, 1) for request_id in load.decodes] + [(p.request_id, p.tokens) for p in load.prefills]
        found = []
        for request_id, rows in wanted:
            request = self._requests.get(request_id)
            if request is None or request.blocks is None:
                raise RuntimeError(f"the plan names {request_id}, which is not running")
            # A prefix hit at admission may have left less to run than was planned, and memory may allow less.
            left = len(request.tokens) - request.computed
            found.append((request, min(rows, left, request.chunk or rows)))
        return sorted(found, key=lambda item: item[0].version)

    def _row_run(self, request: Request, rows: int) -> RowRun:
        if request.blocks is None:
            raise RuntimeError(f"{request.id} has no blocks")
        self._requests.blocks.grow(request.blocks, rows)
        adapter = request.message.adapter
        handle = None if adapter is None else self._adapters.handle(adapter)
        return RowRun(rows, request.computed + rows, request.blocks.blocks, handle)

    @staticmethod
    def _token_ids(scheduled: list[tuple[Request, int]]) -> list[int]:
        return [t for request, rows in scheduled for t in request.tokens[request.computed : request.computed + rows]]

    def _take_pending(self, outcome: Outcome) -> None:
        """Read what the forwards of this iteration left on the device."""
        while self._pending:
            pending = self._pending.pop(0)
            readings: list[Reading] = []
            fault = attempt("reading tokens", lambda p=pending, r=readings: r.extend(p.take()))  # type: ignore[misc]
            if fault is not None:
                outcome.failed.update(dict.fromkeys((request.id for request, _ in pending.scheduled), fault))
                outcome.disturbed = True
            for reading in readings:
                self._commit(reading, outcome)

    def _commit(self, reading: Reading, outcome: Outcome) -> None:
        """Count a request's rows and take its token."""
        request, rows, work = reading.request, reading.rows, outcome.work
        if not reading.finite:
            outcome.failed[request.id] = _not_finite(request)  # its rows ran as planned
            return
        if request.output and len(request.tokens) - request.computed == 1:
            work.decode += rows
        else:
            work.prefill += rows
        if request.version:
            work.adapters.add(request.version)
        request.prompt_logprobs += reading.prompt_logprobs
        self._requests.commit(request, rows)
        if reading.sampled is not None:
            outcome.sampled.append((request, reading.sampled))

    # ------------------------------------------------------------------ training units

    def _unit_or_loss(self, unit: Unit, sweep: Sweep, outcome: Outcome) -> None:
        """A unit that ends half-way has added to sums that others share: its sweep is lost, and nothing else."""
        fault = attempt("a training unit", lambda: self._unit(unit, sweep, outcome.work))
        if fault is not None:
            self._lose({unit.sweep_id: sweep}, fault, outcome)

    def _unit(self, unit: Unit, sweep: Sweep, work: Work) -> None:
        work.units += 1
        if sweep.done:
            return
        work.adapters.update(f"job:{step.job_id}" for step in sweep.steps)
        if isinstance(unit, HeadUnit):
            before = sweep.head_rows
            run_head_unit(self.model, sweep, unit.rows, unit.steps)
            work.head += sweep.head_rows - before
        elif isinstance(unit, BackwardUnit):
            rows = min(unit.tokens, sweep.undone)
            run_backward_unit(self.model, sweep, unit.tokens)
            work.train_backward += rows / sweep.layers
        elif isinstance(unit, ForwardUnit):
            rows, first = sweep.partial_rows or unit.tokens, sweep.partial_layer
            run_sweep_layers(self.model, sweep, unit.tokens, unit.layers)
            work.train_forward += rows * min(unit.layers, sweep.layers - first) / sweep.layers


def _not_finite(request: Request) -> Fault:
    return Fault("adapter_invalid", _NOT_FINITE) if request.version else Fault(INTERNAL, "the values are not finite")
