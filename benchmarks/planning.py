"""How long the scheduler thinks: milliseconds of plan() and observe() by running requests, waiting ones and sweeps.

    python -P benchmarks/planning.py [--rounds 200]

The model is warmed up on the plans of the same states. Times are of one core, garbage collection included.
"""

from __future__ import annotations

import argparse
import time

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import RequestState, SchedulerState, SweepJob, SweepState


def busy_state(now: float, running: int, waiting: int, sweeps: int) -> SchedulerState:
    """Streams in decode, the newest two in prefill, a queue behind them, and sweeps in backward, then forward."""
    requests = []
    for i in range(running + waiting):
        is_running = i < running
        decoding = i < running - 2
        requests.append(
            RequestState(
                request_id=f"req-{i}",
                tenant=f"tenant-{i % 7}",
                weight=1.0,
                slo_class="batch" if i % 4 == 3 else "interactive",
                arrived=now - 10.0 + 0.01 * i,
                total_tokens=301 + i if decoding else 900,
                computed_tokens=300 + i if decoding else 256 * is_running,
                output_tokens=50 if decoding else 0,
                blocks_held=(301 + i) // 16 + 1 if decoding else 16 * is_running,
                adapter=None if i % 3 == 0 else f"adapter-{i % 20}",
                adapter_ready=True,
                ttft_deadline=now + 5.0,
                itl_deadline=now + 0.2 if decoding else None,
                running=is_running,
            )
        )
    states = tuple(
        SweepState(
            sweep_id=i,
            jobs=(SweepJob(f"job-{i}", "tenant", 1.0, "normal"),),
            layers=32,
            stream_tokens=4096,
            window=512,
            forward_tokens=4096 if i == 0 else 512,
            partial_tokens=0,
            partial_layer=0,
            head_rows_ready=0,
            head_rows_left=0 if i == 0 else 900,
            backward=True,
            backward_layer=20 if i == 0 else 31,
            backward_tokens=0,
        )
        for i in range(sweeps)
    )
    return SchedulerState(now, tuple(requests), states, 4000, 16, running + 8, 32)


def measure(running: int, waiting: int, sweeps: int, rounds: int) -> tuple[list[float], list[float], int]:
    """Sorted milliseconds of plan() and observe(), and the training units of the last plan."""
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.2))
    plans, observations, units = [], [], 0
    for i in range(rounds + 20):
        state = busy_state(float(i), running, waiting, sweeps)
        start = time.perf_counter()
        plan = scheduler.plan(state)
        middle = time.perf_counter()
        parts: dict[int | str, float] = dict.fromkeys(range(len(plan.units)), 0.002)
        rows = len(plan.decodes) + sum(p.tokens for p in plan.prefills) + sum(r.tokens for r in plan.rides)
        parts["forward"] = 0.02 + 0.00005 * rows
        scheduler.observe(plan, state, sum(parts.values()) + 0.001, parts)
        end = time.perf_counter()
        units = len(plan.units)
        if i >= 20:
            plans.append(1e3 * (middle - start))
            observations.append(1e3 * (end - middle))
    return sorted(plans), sorted(observations), units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    print("| running | waiting | sweeps | units planned | plan p50 ms | plan p99 ms | observe p50 ms |")
    print("|---|---|---|---|---|---|---|")
    for running, waiting, sweeps in ((4, 0, 1), (64, 100, 4), (256, 100, 4), (256, 1000, 50)):
        plans, observations, units = measure(running, waiting, sweeps, rounds)
        half, most = rounds // 2, rounds * 99 // 100
        print(
            f"| {running} | {waiting} | {sweeps} | {units} "
            f"| {plans[half]:.2f} | {plans[most]:.2f} | {observations[half]:.2f} |"
        )


if __name__ == "__main__":
    main()
