"""The scheduler: one object that plans iterations and learns from their durations.

It may assume that states come in order of time and that a plan is carried out as it stands. It is a function of the
calls made to it, with no clock, no I/O and no randomness: the same calls give the same plans.

One plan, in this order:

1. *Decodes and queue* (`admission`): all running decodes, then the prompts that memory, places and adapters allow.
   Where they lack blocks training gives them back, and it gets its own when they leave room (`memory`).
2. *Prompt chunks* (`chunks`): the most prompt tokens whose predicted iteration stays inside the inter-token budget,

       budget = min(itl_seconds, min over running streams of (itl_deadline − now)),

   where streams with looser promises may share longer iterations (`budget`).

3. *Training* (`training`) fills what is left of the budget, less what first tokens still need: a prompt that goes on
   after this iteration is owed deadline − now − (its remaining iterations). In an iteration that no stream shares the
   budget is one inter-token promise, because a request may arrive; a training unit larger than that still runs. A
   tenant's training gives way to prompts of tenants that were served less, and while several tenants ask all training
   keeps to a share of the promise.

"Predicted" is the latency model's upper estimate (`latency`); the plan tells both it and the mean.

*Ahead.* While a device works on an iteration, the next one's plan can be made for the state that is expected after it
(`draft`). That leaves no trace here: a draft counts only once `plan` is given it together with the state that came,
and only if that state is the one expected and the clock leaves the draft the time that it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from coserve.scheduler.admission import Admission, AdmissionPolicy
from coserve.scheduler.budget import iteration_budget
from coserve.scheduler.chunks import ChunkPolicy, cut, first_token_slack, with_chunks
from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.costs import Costs
from coserve.scheduler.crowd import Crowd
from coserve.scheduler.deadlines import Expired, without_expired
from coserve.scheduler.device_cost import device_cost, row_seconds, trained_seconds
from coserve.scheduler.fairness import FairShare
from coserve.scheduler.features import adapters_of, decode_load
from coserve.scheduler.forecast import JobForecast, JobWork, forecast
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.margin import Errors
from coserve.scheduler.memory import MemoryPolicy, Moves, copies, runnable, waits
from coserve.scheduler.outputs import Outputs
from coserve.scheduler.plan_features import plan_features, served_requests
from coserve.scheduler.queue import QueueClock, Queued
from coserve.scheduler.rates import TrainingRate
from coserve.scheduler.state import Plan, Prefill, RequestState, SchedulerState, SweepState
from coserve.scheduler.training import TrainingPolicy, seconds_beside
from coserve.scheduler.traits import Traits

# How much later than expected a draft may begin, as a share of the inter-token promise. Deliveries vary by so much, and
# to plan anew would take longer.
_SLIP = 0.01


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan for a state, and what the scheduler is to remember of it."""

    plan: Plan
    state: SchedulerState  # without those that expire
    slack: float  # seconds from `state.now` that it may last so that no first token is late
    boost: float  # of the upper estimates it was held against
    admission: AdmissionPolicy  # as the plan leaves it
    memory: MemoryPolicy  # likewise
    admitted: int
    waiting: bool  # whether somebody is left in the queue


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.traits = Traits(config.layer_windows, config.graph_rows, config.usual_pages)
        self.model = LatencyModel(config.quantile, config.prompt_quantile, config.forgetting, self.traits)
        self.share = FairShare(config.credit, config.remembered, config.itl_seconds)
        self._outputs = Outputs(config.known_outputs, config.surprise)
        self._admission = AdmissionPolicy(config, self._outputs)
        self.memory = MemoryPolicy(config)
        self._chunks = ChunkPolicy(config)
        self._training = TrainingPolicy(config)
        self._clock = QueueClock()
        self._planned = Plan()  # the last one
        self._rate = TrainingRate(config.itl_seconds, config.floor_share, config.head_rows)
        self._costs = Costs(self.model)

    def plan(self, state: SchedulerState, draft: Draft | None = None) -> Plan:
        """The next iteration's work. Empty only if nothing can run now.

        Requests in `preempt` give their blocks back first; those in `unservable` need more blocks than there are and
        are to be ended with an error by the caller, and so are those in `expired`, before anything runs. `adapters` is
        for the loader: without regard for it, requests of evicted adapters may wait for each other.

        Args:
            draft: made ahead for this state, perhaps. If it holds, the plan is `draft.plan` itself.
        """
        self._rate.meet(state, self.model)
        state, expired = without_expired(state)
        if not state.sweeps:
            self._training.floor.forget()
        lineup = self._meet(self.share, state)
        if draft is None or draft.plan.expired != expired.ids or not self._holds(draft, state, lineup):
            draft = self._make(state, expired, self.share, lineup)
        self._admission, self.memory = draft.admission, draft.memory
        self._clock.note(state.now, draft.waiting, draft.admitted)
        self._planned = draft.plan
        return draft.plan

    def draft(self, state: SchedulerState) -> Draft:
        """A plan for a state that is expected: to be made while the iteration before it runs. Changes nothing."""
        share = self.share.copy()
        state, expired = without_expired(state)
        lineup = self._meet(share, state)
        return self._make(state, expired, share, lineup)

    def _meet(self, share: FairShare, state: SchedulerState) -> Lineup:
        """Tells `share` who is there."""
        lineup = Lineup(state, share)
        share.meet(state.now, lineup.tenants, state.sweeps)
        if share.tenants > 1:
            share.row_seconds = row_seconds(self.model)
        return lineup

    def _holds(self, draft: Draft, state: SchedulerState, lineup: Lineup) -> bool:
        """Whether a plan that was made ahead is still right: nothing came between, and the clock leaves it the time
        that it takes, or all that it was given."""
        if state != draft.state or self.model.margins.boost > draft.boost:
            return False
        plan, late = draft.plan, state.now - draft.state.now
        decodes = set(plan.decodes)
        running = (r for r in state.requests if r.request_id in decodes)
        budget = iteration_budget(self.config, state.now, running, lineup.expects)
        given = min(plan.upper_seconds, plan.budget_seconds, draft.slack)
        return given <= min(budget, draft.slack - late) + _SLIP * self.config.itl_seconds

    def _make(self, state: SchedulerState, expired: Expired, share: FairShare, lineup: Lineup) -> Draft:
        """`share` has met the state. The policies that remember something are copied first: they replace it."""
        costs = self._costs
        costs.begin()
        memory = copy(self.memory)
        policy, admission, moves = self._admit(state, expired, share, lineup, memory)
        budget = iteration_budget(self.config, state.now, admission.decodes, lineup.expects)
        adapters = adapters_of(admission.decodes)
        decodes = decode_load(admission.decodes, adapters, self.traits)
        sweeps = share.order_sweeps(moves.runnable)
        due = self._training.due(sweeps, decodes, budget, costs)
        owed = due.beside if due else None  # it has its place before prompts
        tokens = self._chunks.tokens(
            state.now, admission.candidates, owed.load if owed else decodes, adapters, budget,
            seconds_beside(owed, costs), policy.behind(state),
        )  # fmt: skip
        load = with_chunks(decodes, admission.candidates, tokens, adapters, self.traits)
        serving = costs.serving(load)
        slack = first_token_slack(state.now, admission.candidates, tokens, serving[1])
        chunks = cut(admission.candidates, tokens)
        room = 0.0 if copies(moves, state) else min(budget, slack)
        sweeps, room = self._for_training(sweeps, share, {c.request.tenant for c, _ in chunks}, budget, room)
        training = self._training.fill(sweeps, load, room, costs, due)
        mean, upper = serving if training.empty else (training.mean, training.upper)
        if not load.rows and training.empty:
            mean = upper = 0.0
        plan = Plan(
            decodes=tuple([r.request_id for r in admission.decodes]),
            prefills=tuple([Prefill(c.request.request_id, n) for c, n in chunks]),
            rides=tuple(training.rides),
            units=tuple(training.units),
            unit_starts=training.starts(budget) if decodes.rows else (),
            preempt=admission.preempt,
            park=moves.park,
            lean=moves.lean,
            place=moves.place,
            expired=expired.ids,
            unservable=admission.unservable,
            adapters=admission.adapters,
            predicted_seconds=mean,
            upper_seconds=upper,
            budget_seconds=budget,
        )
        admitted = sum(not c.request.running for c, _ in chunks)
        boost = self.model.margins.boost
        return Draft(plan, state, slack, boost, policy, memory, admitted, admission.waiting > admitted)

    def _admit(
        self, state: SchedulerState, expired: Expired, share: FairShare, lineup: Lineup, memory: MemoryPolicy
    ) -> tuple[AdmissionPolicy, Admission, Moves]:
        """Who may run and what gives its memory for that; first the copy of our policy that decided it."""
        crowd, policy = self._crowd(lineup, share), copy(self._admission)
        standing = memory.look(state)
        stock = standing.without_giving if expired.release else standing.stock
        admission = policy.decide(state, share, lineup, crowd, stock, expired.release)
        if expired.release:
            return policy, admission, memory.keep(state)
        if memory.lets_end(state, standing, admission, self.model):
            policy = copy(self._admission)
            admission = policy.decide(state, share, lineup, crowd, standing.without_giving)
            return policy, admission, memory.keep(state)
        return policy, admission, memory.decide(state, standing, admission, policy.behind(state), share)

    def shortened(self, plan: Plan, state: SchedulerState, units: int) -> Plan:
        """`plan` with its first `units` training units only, which is what ran of it."""
        short = replace(plan, units=plan.units[:units], unit_starts=plan.unit_starts[:units])
        mean, upper = self.model.predict(plan_features(short, state, self.traits))
        short = replace(short, predicted_seconds=mean, upper_seconds=upper)
        if plan == self._planned:
            self._planned = short
        return short

    def observe(
        self,
        plan: Plan,
        state: SchedulerState,
        seconds: float,
        parts: Mapping[int | str, float] | None = None,
    ) -> None:
        """Learn that `plan`, made for `state` (by this scheduler or for calibration), took `seconds`.

        Args:
            parts: seconds of the parts that were timed on their own: "forward" for the packed forward, and a unit's
                index in `plan.units`. Parts left out are learned from the rest of the iteration.

        Raises:
            KeyError: the plan names something that the state does not have.
            ValueError: a duration is negative or not finite, or a part is not of this plan.
        """
        if plan.empty:
            return
        requests = served_requests(plan, state)
        features = plan_features(plan, state, self.traits, requests)
        trained = trained_seconds(plan, requests, features, seconds, self.model)
        if not copies(plan, state):
            self.model.observe(features, seconds, parts)
        self._settle(plan, state, requests, seconds, trained)

    def account(self, plan: Plan, state: SchedulerState, seconds: float) -> None:
        """Charge `seconds` to whom `plan` served, and learn nothing: something of it did not run as planned."""
        if not plan.empty:
            requests = served_requests(plan, state)
            features = plan_features(plan, state, self.traits, requests)
            trained = trained_seconds(plan, requests, features, seconds, self.model)
            self._settle(plan, state, requests, seconds, trained)

    def queue(self, state: SchedulerState) -> tuple[Queued, ...]:
        """Who waits, in the order in which they would be admitted now, why, and for how long still. Changes nothing."""
        return self._clock.forecast(state, Lineup(state, self.share), self._admission)

    def sweep_waits(self, state: SchedulerState) -> dict[int, str]:
        """Why sweeps that are not placed wait, for people. Changes nothing."""
        return waits(state)

    def forecast(self, jobs: Sequence[JobWork], sweeps: Sequence[SweepState]) -> tuple[JobForecast, ...]:
        """How fast the jobs train and when they end, as far as is known now. `jobs`: all that are there, or an empty
        sequence when there is none, which ends what was measured of them."""
        if not jobs and not sweeps:
            self._rate.rest()
        speed = self._rate.speed(self.model)
        return forecast(jobs, sweeps, self.model, self.config.head_rows, speed, self.config.floor_share)

    def errors(self) -> Errors:
        """How wrong the predictions of the last iterations were."""
        return self.model.margins.errors

    def _crowd(self, lineup: Lineup, share: FairShare) -> Crowd:
        if not share.shared:
            return Crowd()
        context = sum([r.total_tokens for r in lineup.running]) // max(1, len(lineup.running))
        promise = self.config.itl_seconds
        return Crowd(self._costs.decoding(context), self.config.crowd_share * promise, promise, share.parts)

    def _for_training(
        self, sweeps: tuple[SweepState, ...], share: FairShare, prompts: Collection[str], budget: float, room: float
    ) -> tuple[tuple[SweepState, ...], float]:
        """Which of `sweeps`, in order, may fill an iteration that runs prompts of these tenants, and up to how many of
        `room` seconds: nobody's training makes first tokens wait of a tenant that was served less, neither beside its
        prompts nor, where several ask, by iterations as long as the promise allows."""
        if share.shared:
            room = min(room, self.config.training_share * max(budget, self.config.itl_seconds))
        first = share.not_ahead(sweeps, prompts)
        return (first, room) if first else (sweeps, 0.0)  # no room is left but the floor's

    def _settle(
        self, plan: Plan, state: SchedulerState, requests: Mapping[str, RequestState], seconds: float,
        trained: dict[int, float],
    ) -> None:  # fmt: skip
        self._rate.count(plan, state)
        if plan == self._planned:  # what ran outside of plans (a calibration) says nothing of clients
            self._outputs.note(plan, state)
        sweeps = self.share.order_sweeps(runnable(state.sweeps, plan.park, plan.place))
        self._training.floor.settle(sweeps, seconds, trained)
        self.share.charge(device_cost(plan, state, seconds, trained, self.model, requests))
