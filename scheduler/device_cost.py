"""What an iteration cost whom: its measured seconds, split over tenants. Pure functions of a plan and the model.

Training units pay their own seconds, rides what they add to the packed forward, and requests the rest of it: rows,
logits, cached tokens read and attention products at the model's prices, so that a tenant pays for its work and not for
its company. All shares of an iteration add up to its seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from coserve.scheduler.features import ForwardLoad, base_vector, forward_vector
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.plan_features import PlanFeatures, plan_load, served_requests
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepState
from coserve.scheduler.traits import Traits

_PROMPT_ROWS = 64
_PROMPT = base_vector(ForwardLoad(prefill_rows=_PROMPT_ROWS, prefill_work=_PROMPT_ROWS**2 // 2, logit_rows=1))


class ServingLoad(NamedTuple):
    """A part of `ForwardLoad`: one a tenant."""

    decode_rows: int = 0
    decode_context: float = 0
    prefill_rows: int = 0
    prefill_work: float = 0
    logit_rows: int = 0


@dataclass(frozen=True, slots=True)
class Prices:
    """Predicted seconds of one of each, in a packed forward of a certain load."""

    row: float
    logit: float
    context: float  # a cached token that a decode row reads
    product: float  # a query-key product of a prompt

    def of(self, load: ServingLoad) -> float:
        return (
            self.row * (load.decode_rows + load.prefill_rows)
            + self.logit * load.logit_rows
            + self.context * load.decode_context
            + self.product * load.prefill_work
        )


def prices(model: LatencyModel, load: ForwardLoad) -> Prices:
    """What each kind of work adds to `load`, and the rest spread over its rows, the iteration's overhead included."""
    whole = float(model.means(base_vector(load)))

    def added(**without: int) -> float:
        return max(0.0, whole - float(model.means(base_vector(replace(load, **without)))))

    logits = added(logit_rows=0) if load.logit_rows else 0.0
    context = added(decode_context=0) if load.decode_context else 0.0
    products = added(prefill_work=0) if load.prefill_work else 0.0
    return Prices(
        row=max(0.0, whole - logits - context - products) / max(1, load.rows),
        logit=logits / max(1, load.logit_rows),
        context=context / max(1, load.decode_context),
        product=products / max(1, load.prefill_work),
    )


def row_seconds(model: LatencyModel) -> float:
    """What a prompt row costs, in a prompt of an ordinary length."""
    return float(model.means(_PROMPT)) / _PROMPT_ROWS


def serving_loads(plan: Plan, requests: Mapping[str, RequestState], traits: Traits) -> dict[str, ServingLoad]:
    """Each tenant's part of the packed forward, without training and adapters."""
    contexts: dict[str, list[int]] = defaultdict(list)  # of decodes
    for request_id in plan.decodes:
        r = requests[request_id]
        contexts[r.tenant].append(r.total_tokens)
    loads = {
        tenant: ServingLoad(len(tokens), traits.context(tokens), logit_rows=len(tokens))
        for tenant, tokens in contexts.items()
    }
    for p in plan.prefills:
        r = requests[p.request_id]
        load = loads.get(r.tenant, ServingLoad())
        loads[r.tenant] = load._replace(
            prefill_rows=load.prefill_rows + p.tokens,
            prefill_work=load.prefill_work + traits.work(r.computed_tokens, p.tokens),
            logit_rows=load.logit_rows + (r.computed_tokens + p.tokens >= r.total_tokens),
        )
    return loads


def total(loads: Iterable[ServingLoad]) -> ForwardLoad:
    whole = ServingLoad(*map(sum, zip(*loads, strict=True)))
    return ForwardLoad(**whole._asdict())


def training_cost(sweeps: tuple[SweepState, ...], trained: Mapping[int, float]) -> dict[str, float]:
    """Seconds by tenant of `trained` seconds by sweep; tenants that share a sweep pay by their rows in it."""
    cost: dict[str, float] = {}
    for sweep in sweeps:
        seconds = trained.get(sweep.sweep_id, 0.0)
        if not seconds:
            continue
        rows = [job.rows or 1 for job in sweep.jobs]
        for job, count in zip(sweep.jobs, rows, strict=True):
            cost[job.tenant] = cost.get(job.tenant, 0.0) + seconds * count / sum(rows)
    return cost


def serving_cost(
    plan: Plan, requests: Mapping[str, RequestState], seconds: float, model: LatencyModel
) -> dict[str, float]:
    """`seconds`, an iteration's without its training, by tenant."""
    tenants = {r.tenant for r in requests.values()}
    if len(tenants) < 2:
        return dict.fromkeys(tenants, seconds)
    loads = serving_loads(plan, requests, model.traits)
    whole_load = total(loads.values())
    if not (plan.prefills or plan.rides):
        whole_load = replace(whole_load, graph_rows=model.traits.replayed(whole_load.rows))
    price = prices(model, whole_load)
    shares = {tenant: price.of(load) for tenant, load in loads.items()}
    whole = sum(shares.values())
    if whole <= 0.0:
        return {tenant: seconds / len(shares) for tenant in shares}
    return {tenant: seconds * share / whole for tenant, share in shares.items()}


def device_cost(
    plan: Plan, state: SchedulerState, seconds: float, trained: Mapping[int, float], model: LatencyModel,
    requests: Mapping[str, RequestState] | None = None,
) -> dict[str, float]:  # fmt: skip
    """An iteration's seconds by tenant; `trained` of them went to the sweeps with these ids. `requests`: those served,
    where they were looked up already."""
    training = sum(trained.values())
    if not (plan.decodes or plan.prefills):
        return training_cost(state.sweeps, {k: v * seconds / training for k, v in trained.items()} if training else {})
    cost = training_cost(state.sweeps, trained)
    requests = served_requests(plan, state) if requests is None else requests
    for tenant, share in serving_cost(plan, requests, seconds - training, model).items():
        cost[tenant] = cost.get(tenant, 0.0) + share
    return cost


def trained_seconds(
    plan: Plan, requests: Mapping[str, RequestState], features: PlanFeatures, seconds: float, model: LatencyModel
) -> dict[int, float]:
    """Of an iteration's `seconds`, those that went to each sweep, by the model's shares; a ride pays what it added.
    `requests`: those that the plan names."""
    trained: dict[int, float] = {}
    means = [mean for mean, _ in model.parts(features)]
    for unit, mean in zip(plan.units, means[1:], strict=True):
        trained[unit.sweep_id] = trained.get(unit.sweep_id, 0.0) + mean
    if plan.rides and features.forward is not None:
        without = plan_load(replace(plan, rides=()), requests, {}, model.traits)
        rest = model.part(forward_vector(without))[0] if without.rows else 0.0
        extra = max(0.0, model.part(features.forward)[0] - rest)
        rows = sum(r.tokens for r in plan.rides)
        for ride in plan.rides:
            trained[ride.sweep_id] = trained.get(ride.sweep_id, 0.0) + extra * ride.tokens / rows
    whole = sum(means)
    return {k: v * seconds / whole for k, v in trained.items()} if whole > 0.0 else {}
