"""Random states, each for one plan, and a scheduler that knows what the little world's work costs."""

from __future__ import annotations

import random
from dataclasses import replace

from scheduler_states import request
from scheduler_world import Stream, Sweep, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.plan_features import plan_features
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepJob, SweepState

NOW = 1000.0
ITL = 0.25
TENANTS = ("a", "b", "c", "d")


def learned() -> Scheduler:
    """It has seen streams, prompts and training."""
    world, scheduler = World(noise=0.1, itl=ITL, blocks=400), Scheduler(SchedulerConfig(itl_seconds=ITL))
    for i in range(200):
        if not world.sweeps and i % 3:
            world.sweeps = [Sweep(1000 + i, 256, 100)]
        if i % 6 == 0 and len(world.streams) < 5:
            world.streams.append(Stream(f"warm{i}", world.now, 60, 20))
        state = world.state()
        plan = scheduler.plan(state)
        parts = world.parts(plan)
        scheduler.observe(plan, state, max(world.carry_out(plan), sum(parts.values())), parts)
    return scheduler


def fresh(scheduler: Scheduler, config: SchedulerConfig) -> Scheduler:
    """One of this configuration that knows what `scheduler` knows of costs, and of nobody. Neither may learn more."""
    made = Scheduler(config)
    made.model = made._costs._model = scheduler.model
    return made


def serve(scheduler: Scheduler, state: SchedulerState, served: dict[str, float]) -> None:
    """Its tenants are there and have been served so many weighted seconds."""
    scheduler._meet(scheduler.share, state)
    weights = {r.tenant: r.weight for r in state.requests}
    scheduler.share.charge({t: seconds * weights[t] for t, seconds in served.items() if t in weights})


def draw_requests(r: random.Random, tenants: int, streams: int = 4, prompts: int = 8) -> tuple[RequestState, ...]:
    """Decodes, running and waiting prompts, in order of arrival; everything of them has a place."""
    made = []
    for i in range(r.randint(0, streams) + r.randint(0, prompts)):
        tenant = r.choice(TENANTS[:tenants])
        made.append(
            request(
                f"r{i}",
                tenant=tenant,
                weight=1.0 + 2.0 * (tenant == "b"),
                slo_class=r.choice(("interactive", "interactive", "batch")),
                arrived=NOW - 5.0 + 0.1 * i,
                total_tokens=r.choice((5, 20, 60, 150)),
                ttft_deadline=NOW + r.choice((-1.0, 0.05, 0.2, 0.6, 3.0, 20.0)),
            )
        )
    kinds = [r.choice(("decode", "prompt", "waiting", "waiting")) for _ in made]
    while kinds.count("decode") > streams:
        kinds[kinds.index("decode")] = "waiting"
    promises = r.choice(((0.05, 0.1, 0.24, 0.24), (0.24,), (0.24, 0.4, 0.9), (0.4, 0.9)))
    return tuple(_as(kind, one, r, promises) for kind, one in zip(kinds, made, strict=True))


def _as(kind: str, one: RequestState, r: random.Random, promises: tuple[float, ...]) -> RequestState:
    if kind == "waiting":
        return one
    done = one.total_tokens - 1 if kind == "decode" else r.randint(1, one.total_tokens - 1)
    held = replace(one, computed_tokens=done, blocks_held=-(-done // 16), running=True)
    if kind == "prompt":
        return held
    return replace(held, output_tokens=3, itl_deadline=NOW + r.choice(promises))


def draw_sweep(r: random.Random, number: int, tenant: str) -> SweepState:
    """At any place of its forward, head or backward."""
    rows, window = r.randint(1, 300), r.choice((16, 64, 256))
    base = SweepState(
        sweep_id=number, jobs=(SweepJob(f"j{number}", tenant, 1.0, r.choice(("normal", "normal", "low"))),),
        layers=r.randint(1, 6), stream_tokens=rows, window=window, forward_tokens=0, partial_tokens=0, partial_layer=0,
        head_rows_ready=0, head_rows_left=r.randint(0, rows), head_steps=r.choice((1, 4, 32)), backward_layer=0,
    )  # fmt: skip
    base = replace(base, backward_layer=base.layers - 1)
    stage = r.choice(("forward", "sliced", "head", "backward"))
    if stage in ("head", "backward"):
        left = base.head_rows_left if stage == "head" else 0
        base = replace(base, forward_tokens=rows, head_rows_left=left, head_rows_ready=left)
        return replace(base, backward_tokens=r.randrange(rows)) if stage == "backward" else base
    base = replace(base, forward_tokens=r.randrange(rows))
    if stage == "sliced" and base.layers > 1:
        tokens = r.randint(1, min(window, rows - base.forward_tokens))
        base = replace(base, partial_tokens=tokens, partial_layer=r.randint(1, base.layers - 1))
    return base


def draw_state(seed: int, tenants: int = 4, sweeps: int = 3, prompts: int = 8) -> SchedulerState:
    r = random.Random(seed)
    requests = draw_requests(r, tenants, prompts=prompts)
    trained = tuple(draw_sweep(r, i, r.choice(TENANTS[:tenants])) for i in range(r.randint(0, sweeps)))
    return SchedulerState(NOW, requests, trained, 500, 16, 64, 8)


def price(scheduler: Scheduler, plan: Plan, state: SchedulerState) -> float:
    """Upper estimates of a plan's parts, without what is left for surprises."""
    boost = scheduler.model.margins.boost
    return sum(
        boost * mean + deviation
        for mean, deviation in scheduler.model.parts(plan_features(plan, state, scheduler.traits))
    )


def upper(scheduler: Scheduler, plan: Plan, state: SchedulerState) -> float:
    """Of a whole iteration without training."""
    return scheduler.model.predict(plan_features(plan, state, scheduler.traits))[1]
