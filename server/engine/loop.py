"""The engine's loop: intake, plan, run, observe, deliver; generation and training in the same iterations.

One thread owns the device and all books. Everything that waits (sockets, disks, optimizer steps) waits on threads of
its own, and the loop picks up what they have finished at the next iteration's intake.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from coserve.scheduler.policy import Draft, Scheduler
from coserve.scheduler.state import Plan, SchedulerState
from coserve.server.engine.adapters import AdapterBook
from coserve.server.engine.containment import attempt
from coserve.server.engine.intake import Intake
from coserve.server.engine.iterations import IterationLog
from coserve.server.engine.outlook import Outlook
from coserve.server.engine.requests import Request, RequestBook
from coserve.server.engine.runner import Flight, Outcome, Runner
from coserve.server.engine.shares import Shares
from coserve.server.engine.stats import StatsClock
from coserve.server.engine.trainer import Trainer
from coserve.server.wire.messages import Failed
from coserve.server.wire.sync import EngineSocket

log = logging.getLogger("coserve.engine")

_IDLE_SECONDS = 0.2  # longest sleep without news
_SIDE_SECONDS = 0.002  # while side work is about to finish


class Engine:
    """All parts of one engine, and the loop that turns them."""

    def __init__(
        self, socket: EngineSocket, intake: Intake, requests: RequestBook, adapters: AdapterBook, trainer: Trainer,
        scheduler: Scheduler, runner: Runner, iterations: IterationLog, stats: StatsClock, *,
        shares: Shares, max_running: int, max_adapters: Callable[[], int], beat: Callable[[], None],
    ) -> None:  # fmt: skip
        self._socket, self._intake = socket, intake
        self._requests, self._adapters, self._trainer = requests, adapters, trainer
        self._scheduler, self._runner = scheduler, runner
        self._iterations, self._stats, self._beat = iterations, stats, beat
        self._outlook = Outlook(requests, adapters, trainer, shares, max_running, max_adapters)
        self._wanted: tuple[str, ...] = ()  # adapters that the last plan wants on the device
        self._ahead: Draft | None = None  # the next plan, if it was made while the last iteration ran

    def run(self) -> None:
        """Until drained."""
        while not self._intake.drained:
            if not self.step():
                soon = self._trainer.busy or self._adapters.moving
                self._socket.wait(_SIDE_SECONDS if soon else _IDLE_SECONDS)

    def step(self) -> bool:
        """One iteration; False if there was nothing to run."""
        self._beat()
        self._intake.take()
        self._intake.load_adapters(self._wanted)
        state = self._outlook.now()
        plan = self._plan(state)
        news, self._wanted = plan.adapters != self._wanted, plan.adapters
        self._prepare(plan)
        if plan.empty:
            self._stats.send_if_due(state)
            moved = plan.preempt or plan.expired or plan.unservable or plan.park or plan.lean or plan.place
            return bool(moved) or news
        started, clock = time.time(), time.perf_counter()
        flight = self._runner.launch(plan, self._trainer.sweeps)
        self._look_ahead(plan, state, flight)
        outcome = self._runner.finish(flight)
        seconds = time.perf_counter() - clock
        if outcome.units < len(plan.units):
            plan = self._scheduler.shortened(plan, state, outcome.units)
        if outcome.disturbed or outcome.captured:
            self._scheduler.account(plan, state, seconds)
        else:
            self._scheduler.observe(plan, state, seconds, outcome.parts)
        self._iterations.record(
            outcome.work, started_at=started, predicted=plan.predicted_seconds, upper=plan.upper_seconds,
            measured=seconds, budget=plan.budget_seconds, streams=bool(plan.decodes),
        )  # fmt: skip
        self._deliver(outcome)
        self._stats.send_if_due(state)
        return True

    def _plan(self, state: SchedulerState) -> Plan:
        """The one that was made ahead, if things came as expected."""
        draft, self._ahead = self._ahead, None
        if draft is None:
            return self._scheduler.plan(state)
        plan = self._scheduler.plan(state, draft)
        self._iterations.count_ahead(plan is draft.plan)
        return plan

    def _look_ahead(self, plan: Plan, state: SchedulerState, flight: Flight) -> None:
        """Make the next plan while the device works on this one; not where it is host and device in one."""
        if self._runner.ahead:
            self._ahead = self._scheduler.draft(self._outlook.after(plan, state, flight.rows))

    def _prepare(self, plan: Plan) -> None:
        """Carry out what the plan says of the books: preemptions, refusals, admissions. Adapters are loaded before the
        next one: they take memory that this one may count on."""
        for request_id in plan.preempt:
            request = self._requests.get(request_id)
            if request is not None:
                self._intake.preempt(request)
                self._iterations.counters["coserve_preemptions_total"] += 1
        admitted = [request for prefill in plan.prefills if (request := self._requests.get(prefill.request_id))]
        for request in admitted:  # before anybody takes blocks: those of idle adapters are free
            if request.message.adapter is not None and not request.acquired:
                self._adapters.acquire(request.message.adapter)
                request.acquired = True
        if plan.park or plan.lean or plan.place:
            self._trainer.rearrange(plan)
            self._iterations.count_moves(plan)
        for request_id in plan.unservable:
            reason = (
                "the sequence needs more K/V blocks than the server, or its tenant's share of it, has; shorten it, or "
                "raise --kv-memory"
            )
            self._fail(request_id, "context_length_exceeded", reason)
        for request in filter(None, map(self._requests.get, plan.expired)):
            late = Failed.past_deadline(request.message)
            self._fail(request.id, late.code, late.message)
        for request in admitted:
            self._iterations.counters["coserve_recomputed_tokens_total"] += self._requests.admit(request)

    def _deliver(self, outcome: Outcome) -> None:
        """Tokens out, and what failed. Latencies are sampled here, where a token leaves the engine."""
        now = time.monotonic()
        for request, sampled in outcome.sampled:
            before = request.last_token_at
            message = self._requests.deliver(request, sampled, now)
            slo_class = request.message.slo_class
            if before is None:
                self._iterations.sample_ttft(slo_class, now - request.message.arrived)
            else:
                self._iterations.sample_itl(slo_class, now - before)
            fault = attempt(f"the answer to {request.id}", partial(self._socket.send, message))
            if fault is not None:
                outcome.failed[request.id] = fault  # it is no message: too large, for instance
            elif message.finish_reason is not None:
                self._intake.finish(request)
        for request_id, fault in outcome.failed.items():
            self._fail(request_id, fault.code, fault.message)
        self._trainer.lose(outcome.lost)

    def _fail(self, request_id: str, code: str, message: str) -> None:
        request: Request | None = self._requests.get(request_id)
        if request is not None:
            self._intake.finish(request)
            self._socket.send(Failed(request_id, code, message))
