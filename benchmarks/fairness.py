"""Tenants side by side, in the simulator: what a small one keeps beside a large one, and how service follows weights.

    python benchmarks/fairness.py [--card cpu-270m] [--rate 0.1] [--seconds 240] [--seeds 3] [--json FILE]

No model and no server: the same scheduler object as the engine's plans under a virtual clock. In the first table tenant
B sends `--rate` requests a second, at drawn times; then A sends `--times` as many beside it; then A starts five
finetuning jobs as well. Its rows come twice: with tenants told apart, and with all of them in one first-come queue.
B's requests are the same in all rows. In the second table both tenants always have 16 requests, of which 16 run at
once, and five jobs; service is device seconds of requests and training together, counted by the simulated device.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import Report, commit, say
from simulate import ITL_STEPS, TTFT_STEPS, WARM_UP, decode_step

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Setup, cards, simulate
from coserve.scheduler.simulation.ledger import Ledger
from coserve.scheduler.simulation.one_tenant import OneTenant
from coserve.scheduler.simulation.report import percentile, training_rate
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths, Sender, Together, Trace, TrainingJob, poisson

JOBS = 5
PLACES = 16  # where weights are compared, for half of the requests: who waits for nothing has nothing to divide
LENGTHS = Lengths(64, 64, 0.3)


def neighbours(make: Callable[[], Any], setup: Setup, rate: float, times: float, jobs: int, seconds: float,
               seed: int) -> Ledger:  # fmt: skip
    """B at `rate`, A at `times` as much, `jobs` jobs of A from second 20 on."""
    loads = [Trace(poisson(random.Random(seed), rate, seconds), seed, LENGTHS, Sender("B"), setup.ttft)]
    if times:
        drawn = poisson(random.Random(seed + 1000), rate * times, seconds)
        loads.append(Trace(drawn, seed + 1000, LENGTHS, Sender("A"), setup.ttft))
    training = [TrainingJob(f"A-{i}", tenant="A", arrives=20.0 + i) for i in range(jobs)]
    return simulate(make, setup, Together(loads), training, seconds=seconds, seed=seed)


def beside(ledgers: list[Ledger], alone: list[Ledger]) -> dict[str, float | None]:
    first = _first_tokens(ledgers, "B")
    gaps = [g for one in ledgers for at, g in one.gaps if at >= WARM_UP]
    p95, before = percentile(first, 0.95), percentile(_first_tokens(alone, "B"), 0.95)
    spent = [sum(one.service.get("B", [0.0, 0.0])) / one.seconds for one in ledgers]
    return {
        "B: TTFT P50 ms": _ms(percentile(first, 0.5)),
        "B: TTFT P95 ms": _ms(p95),
        "P95 / alone": p95 / before if p95 and before else None,
        "A: TTFT P95 ms": _ms(percentile(_first_tokens(ledgers, "A"), 0.95)),
        "tokens inside": sum(g <= ledgers[0].setup.itl for g in gaps) / len(gaps) if gaps else None,
        "A: training tokens/s": sum(training_rate(one, WARM_UP) for one in ledgers) / len(ledgers),
        "B: share of the time": sum(spent) / len(spent),
    }


def contest(make: Callable[[], Any], setup: Setup, weight: float, seconds: float, seed: int) -> dict[str, float]:
    """Both tenants always have work waiting at both doors; A's weight is `weight`, B's is 1."""
    setup = replace(setup, max_running=PLACES)
    loads = [
        ClosedLoop(16, seed + i, LENGTHS, setup.ttft, tenant=tenant, weight=own)
        for i, (tenant, own) in enumerate((("A", weight), ("B", 1.0)))
    ]
    training = [
        TrainingJob(f"{tenant}-{i}", tenant=tenant, weight=own)
        for tenant, own in (("A", weight), ("B", 1.0)) for i in range(JOBS)
    ]  # fmt: skip
    ledger = simulate(make, setup, Together(loads), training, seconds=seconds, seed=seed)
    (a, b) = (ledger.service[t] for t in ("A", "B"))
    return {
        "A: requests s": a[0], "A: training s": a[1], "B: requests s": b[0], "B: training s": b[1],
        "A / B": sum(a) / sum(b), "gap by weight, s": abs(sum(a) / weight - sum(b)),
    }  # fmt: skip


def _first_tokens(ledgers: list[Ledger], tenant: str) -> list[float]:
    """Seconds to first tokens; of requests without one, what they have waited."""
    return [
        (s.first_at or one.seconds) - s.arrived
        for one in ledgers for s in one.streams if s.tenant == tenant and s.arrived >= WARM_UP
    ]  # fmt: skip


def _cell(item: tuple[str, float | None]) -> object:
    name, value = item
    return f"{100 * value:.1f}%" if value is not None and name in ("tokens inside", "B: share of the time") else value


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--card", choices=list(cards()), default="cpu-270m")
    options.add_argument("--rate", type=float, default=0.1, help="B's requests a second")
    options.add_argument("--times", type=float, default=10.0, help="A's, in B's")
    options.add_argument("--promise", type=float, default=ITL_STEPS, help="between tokens, in steps of four streams")
    options.add_argument("--seconds", type=float, default=240.0)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--json", type=Path, metavar="FILE")
    o = options.parse_args()
    card = cards()[o.card]
    itl = o.promise * decode_step(card)
    setup = Setup(card, itl, TTFT_STEPS * itl, blocks=16384)
    config = SchedulerConfig(itl_seconds=itl, layer_windows=card.windows, graph_rows=card.graph_rows)
    makers: dict[str, Callable[[], Any]] = {
        "told apart": lambda: Scheduler(config), "one queue": lambda: OneTenant(Scheduler(config)),
    }  # fmt: skip
    facts = {"commit": commit(), "seeds": str(o.seeds), "seconds each": f"{o.seconds:g}"}
    what = f"{card.name}, promise {1e3 * itl:.0f} ms between tokens"

    rows: list[list[object]] = []
    figures: dict[str, Any] = {}
    for name, make in makers.items():
        runs = {}
        for case, times, jobs in (("B alone", 0.0, 0), (f"and A, {o.times:g} times B", o.times, 0),
                                  (f"and A with {JOBS} jobs", o.times, JOBS)):  # fmt: skip
            say(f"{name}: {case}")
            runs[case] = [neighbours(make, setup, o.rate, times, jobs, o.seconds, seed) for seed in range(o.seeds)]
            found = beside(runs[case], runs["B alone"])
            figures[f"{name}, {case}"] = found
            rows.append([name, case, *map(_cell, found.items())])
    Report(f"Simulated: a small tenant beside a large one, {what}, B {o.rate:g} requests/s",
           ["tenants", "load", *found], facts, rows=rows).emit(None)  # fmt: skip

    rows = []
    for name, make in makers.items():
        for weight in (1.0, 3.0):
            say(f"{name}: weights {weight:g}:1")
            each = [contest(make, setup, weight, o.seconds, seed) for seed in range(o.seeds)]
            mean = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
            figures[f"{name}, {weight:g}:1"] = mean
            rows.append([name, f"{weight:g}:1", *mean.values()])
    print()
    Report(f"Simulated: service by weight, {what}", ["tenants", "weights A:B", *mean], facts, rows=rows,
           figures=figures).emit(o.json)  # fmt: skip


if __name__ == "__main__":
    main()
