"""One store of blocks for streams and training: who gives way in a burst, and that a full server still trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Ledger, Noise, Setup, cards, simulate
from coserve.scheduler.simulation.faults import MemoryPressure
from coserve.scheduler.simulation.streams import Stream
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths, Trace, TrainingJob, Workload
from coserve.scheduler.state import Plan, SchedulerState

CARD = replace(cards()["cpu-270m"], noise=Noise(sigma=0.03))
PROMISE = 0.152  # four times the decode step of four streams
TTFT = 20.0 * PROMISE
SETUP = Setup(CARD, itl=PROMISE, ttft=TTFT, blocks=200, activation=0.375, lean=0.5, activation_blocks=120)
JOB = TrainingJob("job", batch=16, length=256)  # 256 blocks of rows
BURST = 10.0


@dataclass
class Watched:
    """A scheduler, and what it planned."""

    scheduler: Scheduler
    calls: list[tuple[SchedulerState, Plan]] = field(default_factory=list)

    def plan(self, state: SchedulerState) -> Plan:
        self.calls.append((state, self.scheduler.plan(state)))
        return self.calls[-1][1]

    def observe(self, plan: Plan, state: SchedulerState, seconds: float,
                parts: Mapping[int | str, float] | None = None) -> None:  # fmt: skip
        self.scheduler.observe(plan, state, seconds, parts)

    def times(self, what: str) -> list[float]:
        return [state.now for state, plan in self.calls if getattr(plan, what)]


def run(
    workload: Workload, *jobs: TrainingJob, seconds: float, setup: Setup = SETUP, faults: tuple = (), **config: float
) -> tuple[Ledger, Watched]:
    watch = Watched(Scheduler(SchedulerConfig(itl_seconds=PROMISE, **config)))
    return simulate(lambda: watch, setup, workload, jobs, seconds=seconds, faults=faults), watch


def training(ledger: Ledger, begin: float, end: float) -> float:
    """Of the time from `begin` to `end`, what went to training."""
    return sum(i.training for i in ledger.iterations if begin <= i.began < end) / (end - begin)


@pytest.mark.parametrize("lean,faults", [
    (0.5, ()), (1.0, ()), (0.5, (MemoryPressure(BURST - 1.0, 8.0, 0.4),)),
], ids=["recompute", "park", "both, with less memory"])  # fmt: skip
def test_in_a_burst_training_gives_way_nobody_is_preempted_and_training_is_back_after_it(lean, faults) -> None:
    trace = Trace([], 0, Lengths(64, 64), ttft=TTFT)
    trace._streams = [Stream(f"b{i}", BURST + 0.01 * i, 64, 300, ttft=TTFT) for i in range(8)]
    ledger, watch = run(trace, JOB, seconds=55.0, setup=replace(SETUP, lean=lean), faults=faults)
    ends = max(s.finished_at or 1e9 for s in ledger.streams)
    assert sum(s.preemptions for s in ledger.streams) == 0
    assert all(s.first_at - s.arrived <= TTFT for s in ledger.streams)
    assert sum(gap <= PROMISE for _, gap in ledger.gaps) >= 0.99 * len(ledger.gaps)
    parks, falls = watch.times("park"), watch.times("lean")
    assert bool(parks) == (lean == 1.0 or bool(faults)) and bool(falls) == (lean < 1.0)
    assert all(BURST < at < ends for at in parks + falls)
    assert training(ledger, ends, ends + 1.0) > 0.85 * training(ledger, 4.0, BURST), "training is back"
    (job,) = ledger.jobs
    assert min(done for done in job.done if done > max(parks + falls)) < ends + 10.0, "what gave way was done"


def test_under_lasting_pressure_a_step_claims_its_memory_and_is_done() -> None:
    """Clients that always want more than there is: steps go on, one after another, and so do the clients."""
    clients = ClosedLoop(12, 0, Lengths(64, 200, 0.3), ttft=60.0)
    small, setup = replace(JOB, batch=4), replace(SETUP, activation=1.5)
    ledger, watch = run(clients, small, seconds=100.0, setup=setup)
    steps = ledger.jobs[0].done
    assert len(steps) >= 7 and max(b - a for a, b in pairwise(steps)) < 25.0
    firsts = sorted(s.first_at for s in ledger.streams if s.first_at is not None)
    assert max(b - a for a, b in pairwise(firsts)) < 15.0, "clients go on"
    placed = [(state, plan) for state, plan in watch.calls if plan.place]
    assert all(any(r.running for r in state.requests) for state, _ in placed[1:]), "the server was never empty"
    without, _ = run(clients, small, seconds=100.0, setup=setup, memory_claim_after=1e9)
    assert len(without.jobs[0].done) <= 2, "so it is the claim that lets them end"
