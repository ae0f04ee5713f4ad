"""Requests, sweeps, states and shares for tests that ask the scheduler for one plan."""

from __future__ import annotations

from dataclasses import replace

from coserve.scheduler.fairness import FairShare
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepJob, SweepState

CREDIT = 1.0


def request(name: str, **changes: object) -> RequestState:
    """A waiting interactive prompt of 20 tokens without an adapter."""
    base = RequestState(
        request_id=name,
        tenant="t",
        weight=1.0,
        slo_class="interactive",
        arrived=float(name.lstrip("abcdefghijklmnopqrstuvwxyz") or 0),
        total_tokens=20,
        computed_tokens=0,
        output_tokens=0,
        blocks_held=0,
        adapter=None,
        adapter_ready=True,
        ttft_deadline=1e9,
        itl_deadline=None,
        running=False,
    )
    return replace(base, **changes)


def stream(name: str, tokens: int = 20, blocks: int | None = None, **changes: object) -> RequestState:
    """A running stream in decode that holds blocks of 16 for what it has computed."""
    held = -(-(tokens - 1) // 16) if blocks is None else blocks
    return replace(
        request(name),
        total_tokens=tokens,
        computed_tokens=tokens - 1,
        output_tokens=3,
        blocks_held=held,
        running=True,
        itl_deadline=1e9,
        **changes,
    )


def prompt(name: str, computed: int, total: int, blocks: int, **changes: object) -> RequestState:
    """A running prompt, partly computed."""
    return replace(
        request(name), computed_tokens=computed, total_tokens=total, blocks_held=blocks, running=True, **changes
    )


def state(*requests: RequestState, free: int = 100, now: float = 100.0, running: int = 8, adapters: int = 2):
    return SchedulerState(now, requests, (), free, 16, running, adapters)


def sweep(number: int = 0, **changes: object) -> SweepState:
    base = SweepState(
        sweep_id=number,
        jobs=(SweepJob(f"j{number}", "t", 1.0, "normal"),),
        layers=4,
        stream_tokens=200,
        window=64,
        forward_tokens=0,
        partial_tokens=0,
        partial_layer=0,
        head_rows_ready=0,
        head_rows_left=150,
        head_steps=32,
        backward=True,
        backward_layer=3,
        backward_tokens=0,
    )
    return replace(base, **changes)


def step(number: int, blocks: int, lean: int | None = None, tenant: str = "t", priority: str = "normal",
         since: float | None = None, **changes: object) -> SweepState:  # fmt: skip
    """A sweep half-way through its forward; not placed if it has waited since `since`."""
    return sweep(
        number, jobs=(SweepJob(f"j{number}", tenant, 1.0, priority),), blocks=blocks, forward_tokens=100,
        lean_blocks=blocks if lean is None else lean, placed=since is None, unplaced_since=since, **changes,
    )  # fmt: skip


def there(*who: RequestState | SweepState, activations: int = 1000, due: int = 0, **changes: object) -> SchedulerState:
    """`due`: blocks that an adapter waits for."""
    requests = [w for w in who if isinstance(w, RequestState)]
    sweeps = tuple(w for w in who if isinstance(w, SweepState))
    return replace(state(*requests, **changes), sweeps=sweeps, activation_blocks=activations, adapter_blocks=due)


def chunks(made: Plan) -> dict[str, int]:
    return {p.request_id: p.tokens for p in made.prefills}


def worked_on(made: Plan) -> set[int]:
    return {r.sweep_id for r in made.rides} | {u.sweep_id for u in made.units}


def meet(share: FairShare, there: SchedulerState) -> None:
    share.meet(there.now, Lineup(there, share).tenants, there.sweeps)


def share_of(served: dict[str, float], weights: dict[str, float] | None = None) -> FairShare:
    """A share whose tenants are there and have been served so many weighted seconds."""
    share = FairShare(CREDIT, 60.0)
    weights = weights or {}
    meet(share, state(*(request(f"w{i}", tenant=t, weight=weights.get(t, 1.0)) for i, t in enumerate(served))))
    share.charge({t: seconds * weights.get(t, 1.0) for t, seconds in served.items()})
    return share
