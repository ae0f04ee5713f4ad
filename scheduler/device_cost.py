"""What an iteration cost whom: its measured seconds, split over tenants. Pure functions of a plan and the model.

Training units pay their own seconds, rides what they add to the packed forward, and requests the rest of it: rows,
logits, cached tokens read and attention products at the model's prices, so that a tenant pays for its work and not for
its company. All shares of an iteration add up to its seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from coserve.scheduler.features import ForwardLoad, base_vector
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepState
from coserve.scheduler.traits import Traits

_PROMPT_ROWS = 64
_PROMPT = base_vector(ForwardLoad(prefill_rows=_PROMPT_ROWS, prefill_work=_PROMPT_ROWS**2 // 2, logit_rows=1))

@dataclass(frozen=True, slots=True)
class Prices:
    """Predicted seconds of one of each, in a packed forward of a certain load."""

    row: float
    logit: float
    context: float  # a cached token that a decode row reads
    product: float  # a query-key product of a prompt

    def of(self, load: ForwardLoad) -> float:
        return (
            self.row * load.rows
            + self.logit * load.logit_rows
            + self.context * load.decode_context
            + self.product * load.prefill_work
        )


def prices(model: LatencyModel, load: ForwardLoad) -> Prices:
    """What each kind of work adds to `load`, and the rest spread over its rows, the iteration's overhead included."""
    whole = model.part(base_vector(load))[0]

    def added(**without: int) -> float:
        return max(0.0, whole - model.part(base_vector(replace(load, **without)))[0])

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


def serving_loads(plan: Plan, requests: Mapping[str, RequestState], traits: Traits) -> dict[str, ForwardLoad]:
    """Each tenant's part of the packed forward, without training and adapters."""
    counts: dict[str, list[float]] = {}  # decode rows, prompt rows, their products, logit rows
    contexts: dict[str, list[int]] = {}
    for request_id in plan.decodes:
        r = requests[request_id]
        count = counts.setdefault(r.tenant, [0, 0, 0, 0])
        count[0] += 1
        count[3] += 1
        contexts.setdefault(r.tenant, []).append(r.total_tokens)
    for p in plan.prefills:
        r = requests[p.request_id]
        count = counts.setdefault(r.tenant, [0, 0, 0, 0])
        count[1] += p.tokens
        count[2] += traits.work(r.computed_tokens, p.tokens)
        count[3] += r.computed_tokens + p.tokens >= r.total_tokens
    return {
        tenant: _load(decodes, traits.context(contexts.get(tenant, ())), rows, work, logits)
        for tenant, (decodes, rows, work, logits) in counts.items()
    }


def _load(decodes: float, context: float, rows: float, work: float, logits: float) -> ForwardLoad:
    return ForwardLoad(int(decodes), context, int(rows), work, logit_rows=int(logits))


def total(loads: Iterable[ForwardLoad]) -> ForwardLoad:
    counts = ((x.decode_rows, x.decode_context, x.prefill_rows, x.prefill_work, x.logit_rows) for x in loads)
    return _load(*map(sum, zip(*counts, strict=True)))


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


def serving_cost(plan: Plan, state: SchedulerState, seconds: float, model: LatencyModel) -> dict[str, float]:
    """`seconds`, an iteration's without its training, by tenant."""
    named = {*plan.decodes, *(p.request_id for p in plan.prefills)}
    requests = {r.request_id: r for r in state.requests if r.request_id in named}
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
    plan: Plan, state: SchedulerState, seconds: float, trained: Mapping[int, float], model: LatencyModel
) -> dict[str, float]:
    """An iteration's seconds by tenant; `trained` of them went to the sweeps with these ids."""
    training = sum(trained.values())
    if not (plan.decodes or plan.prefills):
        return training_cost(state.sweeps, {k: v * seconds / training for k, v in trained.items()} if training else {})
    cost = training_cost(state.sweeps, trained)
    for tenant, share in serving_cost(plan, state, seconds - training, model).items():
        cost[tenant] = cost.get(tenant, 0.0) + share
    return cost
