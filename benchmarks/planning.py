"""How long the scheduler thinks: milliseconds of plan() and observe() by requests, jobs and adapters.

    python benchmarks/planning.py [--rounds 300] [--json FILE]

No model and no server. The states are busy ones: all streams decode but the newest, which are in prefill; every third
request asks the base model, the others one of the adapters; every job has a sweep of its own, each at another place of
its forward, head or backward. The jobs are of one tenant of large weight, so that their training gives way to no
prompt. Sweeps hold blocks, and every tenth waits for more than the requests leave; every fifth request has a deadline;
adapters differ in size; layers have windows as in Gemma 3 270M, and decode steps alone would be replayed as graphs.

Times are the thread's CPU time, which does not count what else the machine does, and wall-clock time beside it.
The last rows have two and four times as much of everything: planning should take no more than two and four times as
long.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness import Report, commit, load_average

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepJob, SweepState

WARM_UP = 30  # rounds that no figure counts
SIZES = ((4, 0, 1, 5), (64, 100, 4, 100), (256, 1000, 50, 5000), (512, 2000, 100, 10_000), (1024, 4000, 200, 20_000))


def busy_state(now: float, running: int, waiting: int, jobs: int, adapters: int) -> SchedulerState:
    requests = tuple(_request(now, i, i < running - 2, i < running, adapters) for i in range(running + waiting))
    sweeps = tuple(_sweep(i, now) for i in range(jobs))
    return SchedulerState(now, requests, sweeps, 4000, 16, running + 8, running + 32)


def config() -> SchedulerConfig:
    return SchedulerConfig(
        itl_seconds=0.2, ttft_seconds=5.0, usual_pages=4, layer_windows=((512,) * 5 + (None,)) * 3,
        graph_rows=(1, 2, 4, *range(8, 257, 8)),
    )  # fmt: skip


def _request(now: float, i: int, decoding: bool, running: bool, adapters: int) -> RequestState:
    return RequestState(
        request_id=f"req-{i}", tenant=f"tenant-{i % 97}", weight=1.0,
        slo_class="batch" if i % 4 == 3 else "interactive", arrived=now - 10.0 + 0.01 * i,
        total_tokens=301 + i % 700 if decoding else 900, computed_tokens=300 + i % 700 if decoding else 256 * running,
        output_tokens=50 if decoding else 0, blocks_held=(301 + i % 700) // 16 + 1 if decoding else 16 * running,
        adapter=None if i % 3 == 0 else f"adapter-{i * 7919 % adapters}", adapter_ready=running or i % 2 == 0,
        ttft_deadline=now + 5.0, itl_deadline=now + 0.2 if decoding else None, running=running,
        adapter_pages=0 if i % 3 == 0 else 1 << i % 4, most_output=512, deadline=now + 60.0 if i % 5 == 0 else None,
    )  # fmt: skip


def _sweep(i: int, now: float) -> SweepState:
    """The oldest has small units left in its backward, so that it can be planned until the budget is full; the others
    stand anywhere. Those without a place have not begun."""
    placed = i % 10 != 7
    stage = (i % 3 if i else 2) if placed else 0
    return SweepState(
        sweep_id=i,
        jobs=(SweepJob(f"job-{i}", "trainer", 1e6, "low" if i % 5 == 4 else "normal", 4096, 1 << i % 4),),
        layers=18, stream_tokens=4096, window=512, forward_tokens=4096 if stage else 8 * i * placed,
        partial_tokens=0, partial_layer=0, head_rows_ready=900 if stage == 1 else 0,
        head_rows_left=900 if stage < 2 else 0, backward_layer=16, backward_tokens=8 * i if stage == 2 else 0,
        blocks=40 + i % 7 if placed else 5000, lean_blocks=20, placed=placed,
        unplaced_since=None if placed else now - 1.0,
    )  # fmt: skip


@dataclass
class Times:
    """Milliseconds, one a round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def take(self, work: Callable[[], Plan | None]) -> Plan | None:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = work()
        self.cpu.append(1e3 * (time.thread_time() - cpu))
        self.wall.append(1e3 * (time.perf_counter() - wall))
        return result


def measure(size: tuple[int, int, int, int], rounds: int) -> tuple[Times, Times, Plan]:
    scheduler = Scheduler(config())
    planning, learning, plan = Times(), Times(), Plan()
    for i in range(WARM_UP + rounds):
        state = busy_state(float(i), *size)
        if i == WARM_UP:
            planning, learning = Times(), Times()
            gc.collect()
        plan = planning.take(lambda state=state: scheduler.plan(state)) or plan  # type: ignore[misc]
        rows = len(plan.decodes) + sum(p.tokens for p in plan.prefills) + sum(r.tokens for r in plan.rides)
        parts: dict[int | str, float] = {**dict.fromkeys(range(len(plan.units)), 0.004), "forward": 0.02 + 5e-5 * rows}
        seconds = sum(parts.values()) + 0.001
        learning.take(lambda made=(plan, state, seconds, parts): scheduler.observe(*made))  # type: ignore[misc]
    return planning, learning, plan


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=300)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    columns = ["running", "waiting", "jobs", "adapters", "units planned", "plan P50 ms", "P99 ms", "wall P50 ms",
               "wall P99 ms", "observe P50 ms"]  # fmt: skip
    report = Report("Planning: milliseconds an iteration", columns, {"commit": commit(), "load before": load_average()})
    for size in SIZES:
        planning, learning, plan = measure(size, arguments.rounds)
        times = [_at(values, share) for values in (planning.cpu, planning.wall) for share in (0.5, 0.99)]
        report.rows.append([*size, len(plan.units), *times, _at(learning.cpu, 0.5)])
        report.figures[f"{size}"] = {"plan_cpu_ms": sorted(planning.cpu), "plan_wall_ms": sorted(planning.wall)}
    report.emit(arguments.json)


def _at(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


if __name__ == "__main__":
    main()
