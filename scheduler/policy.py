"""The scheduler: one object that plans iterations and learns from their durations.

It may assume that states come in order of time and that a plan is carried out as it stands. It is a function of the
calls made to it, with no clock, no I/O and no randomness: the same calls give the same plans.

One plan, in this order:

1. *Decodes and queue* (`admission`): all running decodes, then the prompts that memory, places and adapters allow.
2. *Prompt chunks* (`chunks`): the most prompt tokens whose predicted iteration stays inside the inter-token budget,

       budget = min(itl_seconds, min over running streams of (itl_deadline − now)).

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

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from coserve.scheduler.admission import AdmissionPolicy
from coserve.scheduler.chunks import ChunkPolicy, cut, first_token_slack, with_chunks
from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.costs import Costs
from coserve.scheduler.crowd import Crowd
from coserve.scheduler.deadlines import Expired, without_expired
from coserve.scheduler.device_cost import device_cost, row_seconds
from coserve.scheduler.fairness import FairShare
from coserve.scheduler.features import (
    ForwardLoad,
    PlanFeatures,
    forward_vector,
    plan_features,
    plan_load,
)
from coserve.scheduler.forecast import JobForecast, JobWork, forecast
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.margin import Errors
from coserve.scheduler.outputs import Outputs
from coserve.scheduler.queue import QueueClock, Queued
from coserve.scheduler.rates import TrainingRate
from coserve.scheduler.state import Plan, Prefill, RequestState, SchedulerState, SweepState
from coserve.scheduler.training import TrainingPolicy

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
    admitted: int
    waiting: bool  # whether somebody is left in the queue


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.model = LatencyModel(config.quantile, config.prompt_quantile, config.forgetting)
        self.share = FairShare(config.credit, config.remembered)
        self._outputs = Outputs(config.known_outputs, config.surprise)
        self._admission = AdmissionPolicy(config, self._outputs)
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
        lineup = self._meet(self.share, state)
        if draft is None or draft.plan.expired != expired.ids or not self._holds(draft, state):
            draft = self._make(state, expired, self.share, lineup, self._admission)
        self._admission = draft.admission
        self._clock.note(state.now, draft.waiting, draft.admitted)
        self._planned = draft.plan
        return draft.plan

    def draft(self, state: SchedulerState) -> Draft:
        """A plan for a state that is expected: to be made while the iteration before it runs. Changes nothing."""
        share = self.share.copy()
        state, expired = without_expired(state)
        lineup = self._meet(share, state)
        return self._make(state, expired, share, lineup, copy(self._admission))  # which replaces what it remembers

    def _meet(self, share: FairShare, state: SchedulerState) -> Lineup:
        """Tells `share` who is there."""
        lineup = Lineup(state, share)
        share.meet(state.now, lineup.tenants, state.sweeps)
        if share.tenants > 1:
            share.row_seconds = row_seconds(self.model)
        return lineup

    def _holds(self, draft: Draft, state: SchedulerState) -> bool:
        """Whether a plan that was made ahead is still right: nothing came between, and the clock leaves it the time
        that it takes, or all that it was given."""
        if state != draft.state or self.model.margins.boost > draft.boost:
            return False
        plan, late = draft.plan, state.now - draft.state.now
        decodes = set(plan.decodes)
        budget = self._budget(state, (r for r in state.requests if r.request_id in decodes))
        given = min(plan.upper_seconds, plan.budget_seconds, draft.slack)
        return given <= min(budget, draft.slack - late) + _SLIP * self.config.itl_seconds

    def _make(
        self, state: SchedulerState, expired: Expired, share: FairShare, lineup: Lineup, policy: AdmissionPolicy
    ) -> Draft:
        """`share` has met the state; `policy` is changed."""
        costs = self._costs
        costs.begin()
        admission = policy.decide(state, share, lineup, self._crowd(lineup, share, costs), expired.release)
        budget = self._budget(state, admission.decodes)
        adapters = {r.adapter for r in admission.decodes if r.adapter is not None}
        decode_load = ForwardLoad(
            decode_rows=len(admission.decodes),
            decode_context=sum(r.total_tokens for r in admission.decodes),
            logit_rows=len(admission.decodes),
            adapters=len(adapters),
        )
        behind = policy.behind(state)
        tokens = self._chunks.tokens(state.now, admission.candidates, decode_load, adapters, budget, costs, behind)
        load = with_chunks(decode_load, admission.candidates, tokens, adapters)
        serving = costs.serving(load)
        slack = first_token_slack(state.now, admission.candidates, tokens, serving[1])
        chunks = cut(admission.candidates, tokens)
        sweeps, room = self._for_training(state, share, {c.request.tenant for c, _ in chunks}, min(budget, slack))
        training = self._training.fill(sweeps, load, room, costs)
        plan = Plan(
            decodes=tuple(r.request_id for r in admission.decodes),
            prefills=tuple(Prefill(c.request.request_id, n) for c, n in chunks),
            rides=tuple(training.rides),
            units=tuple(training.units),
            preempt=admission.preempt,
            expired=expired.ids,
            unservable=admission.unservable,
            adapters=admission.adapters,
            budget_seconds=budget,
        )
        if not plan.empty:
            mean, upper = serving if training.empty else (training.mean, training.upper)
            plan = replace(plan, predicted_seconds=mean, upper_seconds=upper)
        admitted = sum(not c.request.running for c, _ in chunks)
        boost = self.model.margins.boost
        return Draft(plan, state, slack, boost, policy, admitted, admission.waiting > admitted)

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
        features = plan_features(plan, state)
        trained = self._trained_seconds(plan, state, features, seconds)
        self.model.observe(features, seconds, parts)
        self._settle(plan, state, seconds, trained)

    def account(self, plan: Plan, state: SchedulerState, seconds: float) -> None:
        """Charge `seconds` to whom `plan` served, and learn nothing: something of it did not run as planned."""
        if not plan.empty:
            features = plan_features(plan, state)
            self._settle(plan, state, seconds, self._trained_seconds(plan, state, features, seconds))

    def queue(self, state: SchedulerState) -> tuple[Queued, ...]:
        """Who waits, in the order in which they would be admitted now, why, and for how long still. Changes nothing."""
        return self._clock.forecast(state, Lineup(state, self.share), self._admission)

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

    def _crowd(self, lineup: Lineup, share: FairShare, costs: Costs) -> Crowd:
        if not share.shared:
            return Crowd()
        context = sum([r.total_tokens for r in lineup.running]) // max(1, len(lineup.running))
        promise = self.config.itl_seconds
        return Crowd(costs.decoding(context), self.config.crowd_share * promise, promise, share.parts)

    def _for_training(
        self, state: SchedulerState, share: FairShare, prompts: Collection[str], room: float
    ) -> tuple[tuple[SweepState, ...], float]:
        """Which sweeps may fill an iteration that runs prompts of these tenants, and up to how many seconds: nobody's
        training makes first tokens wait of a tenant that was served less, neither beside its prompts nor, where several
        ask, by iterations as long as the promise allows."""
        sweeps = share.order_sweeps(state.sweeps)
        if share.shared:
            room = min(room, self.config.training_share * self.config.itl_seconds)
        first = share.not_ahead(sweeps, prompts)
        return (first, room) if first else (sweeps, 0.0)  # no room is left but the floor's

    def _settle(self, plan: Plan, state: SchedulerState, seconds: float, trained: dict[int, float]) -> None:
        self._rate.count(plan, state)
        if plan == self._planned:  # what ran outside of plans (a calibration) says nothing of clients
            self._outputs.note(plan, state)
        self._training.settle(self.share.order_sweeps(state.sweeps), seconds, trained)
        self.share.charge(device_cost(plan, state, seconds, trained, self.model))

    def _budget(self, state: SchedulerState, decodes: Iterable[RequestState]) -> float:
        due = [r.itl_deadline for r in decodes if r.itl_deadline is not None]
        return min(self.config.itl_seconds, min(due) - state.now) if due else self.config.itl_seconds

    def _trained_seconds(
        self, plan: Plan, state: SchedulerState, features: PlanFeatures, seconds: float
    ) -> dict[int, float]:
        """The iteration's seconds that went to each sweep, by the model's shares; a ride pays what it added."""
        trained: dict[int, float] = {}
        means = [mean for mean, _ in self.model.parts(features)]
        for unit, mean in zip(plan.units, means[1:], strict=True):
            trained[unit.sweep_id] = trained.get(unit.sweep_id, 0.0) + mean
        if plan.rides and features.forward is not None:
            requests = {r.request_id: r for r in state.requests}
            without = plan_load(replace(plan, rides=()), requests, {})
            rest = self.model.part(forward_vector(without))[0] if without.rows else 0.0
            extra = max(0.0, self.model.part(features.forward)[0] - rest)
            rows = sum(r.tokens for r in plan.rides)
            for ride in plan.rides:
                trained[ride.sweep_id] = trained.get(ride.sweep_id, 0.0) + extra * ride.tokens / rows
        whole = sum(means)
        return {k: v * seconds / whole for k, v in trained.items()} if whole > 0.0 else {}
