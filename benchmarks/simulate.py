"""Policies side by side, in the simulator: what each keeps of the promises and of training, on a named card.

    python benchmarks/simulate.py [--streams 4 | --arrivals gamma --rate 0.8] [--promise 4] [--plot FILE.png]
    python benchmarks/simulate.py --fleet --tenants 2000 --adapters 2 --rate 50 --jobs 100

No model and no server: the same scheduler object as the engine's plans under a virtual clock. The card says what work
costs; `cpu-270m` was fitted to recorded iterations, `h200-8b` is worked out from measured ceilings. Clients of
`--streams` send one request after another; `--arrivals` sends requests at drawn times, whatever becomes of them.
Retention and load are those of benchmarks/coserving.py; gain is their sum where 99% of requests are inside both
promises, and taking turns cannot bring it above 1. Figures are means over the seeds, latencies over all their tokens.
`--fleet` says instead how many such engines all tenants together need.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import Report, commit, say, today
from policy_plot import plot
from recorded import read_iterations, read_trace

from coserve.scheduler import SchedulerConfig
from coserve.scheduler.features import ForwardLoad
from coserve.scheduler.simulation import Card, Setup, cards, policies, simulate
from coserve.scheduler.simulation import report as judge
from coserve.scheduler.simulation.faults import Fault, MemoryPressure, Restart, Slowdown
from coserve.scheduler.simulation.fit import fit
from coserve.scheduler.simulation.fleet import engines_needed
from coserve.scheduler.simulation.ledger import Ledger
from coserve.scheduler.simulation.placement import Demand
from coserve.scheduler.simulation.report import ATTAINMENT, best_alone, largest_rate, percentile, service
from coserve.scheduler.simulation.workloads import (
    ClosedLoop,
    Lengths,
    Population,
    Trace,
    TrainingJob,
    Workload,
    bursts,
    diurnal,
    gamma,
    poisson,
)  # fmt: skip

WARM_UP = 10.0  # seconds that no figure counts
PROMISED_STREAMS = 4  # the promise is a multiple of the decode step at this many
# As a server on a CPU promises by default (server/engine/start.py):
ITL_STEPS = 4.0  # a token after so many decode steps
TTFT_STEPS = 10.0  # a first token after so many inter-token promises


@dataclass(frozen=True)
class Case:
    """Everything of a comparison but the policy."""

    setup: Setup
    seconds: float
    seeds: int
    lengths: Lengths
    population: Population
    arrivals: str  # "closed", "replay" or a kind of arrivals
    load: float  # streams, times as fast, or requests a second
    cv: float
    jobs: Sequence[TrainingJob]
    faults: Sequence[Fault]
    recorded: Sequence[tuple[float, int, int]] = ()  # of a replayed trace; its load is how many times as fast it goes

    def workload(self, seed: int, load: float | None = None) -> Workload:
        load = self.load if load is None else load
        if self.arrivals == "closed":
            return ClosedLoop(round(load), seed, self.lengths, ttft=self.setup.ttft)
        if self.arrivals == "replay":
            fast = [(at / load, prompt, outputs) for at, prompt, outputs in self.recorded] if load else []
            return Trace.replay([r for r in fast if r[0] < self.seconds], seed, self.population, self.setup.ttft)
        rng = random.Random(seed)
        draw: dict[str, Callable[[], list[float]]] = {
            "poisson": lambda: poisson(rng, load, self.seconds),
            "gamma": lambda: gamma(rng, load, self.seconds, self.cv),
            "bursts": lambda: bursts(rng, load, self.seconds),
            "diurnal": lambda: diurnal(rng, load, self.seconds),
        }
        return Trace(draw[self.arrivals](), seed, self.lengths, self.population, self.setup.ttft)

    def run(self, make: Callable[[], Any], seed: int, *, load: float | None = None, jobs: bool = True) -> Ledger:
        return simulate(
            make, self.setup, self.workload(seed, load), self.jobs if jobs else (), seconds=self.seconds, seed=seed,
            faults=self.faults,
        )  # fmt: skip


def decode_step(card: Card, streams: int = PROMISED_STREAMS, context: int = 64) -> float:
    load = ForwardLoad(streams, streams * context, logit_rows=streams, graph_rows=card.replayed(streams))
    return card.forward_seconds(load) + card.overhead


def baseline(case: Case, make: Callable[[], Any]) -> tuple[float, float | None]:
    """(training tokens/s of the jobs alone, the most load alone with 99% of requests inside both promises: tokens/s
    of closed loops, requests/s of arrivals)."""
    calm = replace(case, faults=())
    alone = judge(calm.run(make, 0, load=0.0), WARM_UP).training_rate
    if case.arrivals != "closed":
        found = largest_rate(lambda q: judge(calm.run(make, 0, load=q, jobs=False), WARM_UP).attainment, case.load / 4)
        return alone, found
    ladder = sorted({max(1, round(case.load * f)) for f in (1, 1.5, 2, 3, 4, 6, 8, 12, 16)})
    return alone, best_alone([judge(calm.run(make, 0, load=n, jobs=False), WARM_UP) for n in ladder])


def row(case: Case, ledgers: Sequence[Ledger], alone: float, best: float | None) -> dict[str, Any]:
    reports = [judge(ledger, WARM_UP) for ledger in ledgers]
    gaps = [g for ledger in ledgers for at, g in ledger.gaps if at >= WARM_UP]
    training = statistics.mean(r.training_rate for r in reports)
    out = statistics.mean(r.output_rate for r in reports)
    kept = training / alone if alone and case.jobs else None
    load = (out if case.arrivals == "closed" else case.load) / best if best else None
    attainment = _mean([r.attainment for r in reports])
    holds = attainment is not None and attainment >= ATTAINMENT and kept is not None and load is not None
    return {
        "requests inside both": attainment,
        "iterations inside": _mean([r.iterations_inside for r in reports]),
        "tokens inside": _mean([r.gaps_inside for r in reports]),
        "ITL P50 ms": _ms(percentile(gaps, 0.5)),
        "ITL P99 ms": _ms(percentile(gaps, 0.99)),
        "TTFT P50 ms": _ms(_mean([r.ttft_p50 for r in reports])),
        "TTFT P99 ms": _ms(_mean([r.ttft_p99 for r in reports])),
        "output tokens/s": out,
        "training tokens/s": training,
        "retention": kept,
        "load": load,
        "gain": (kept or 0.0) + (load or 0.0) if holds else None,
    }


def main() -> None:
    options = _parser()
    arguments = options.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        options.error("--plot needs matplotlib, which coserve does not install: pip install matplotlib")
    card = cards()[arguments.card]
    if arguments.fit:
        fitted = fit(card, read_iterations(arguments.fit))
        say("factors of passes, head, backward: " + ", ".join(f"{f:.2f}" for f in fitted.factors)
            + f"; left unexplained: {100 * fitted.error:.1f}%")  # fmt: skip
        card = fitted.card
    itl = arguments.itl_ms / 1e3 if arguments.itl_ms else arguments.promise * decode_step(card)
    config = SchedulerConfig(itl_seconds=itl, layer_windows=card.windows, graph_rows=card.graph_rows)
    known = policies(config)
    if arguments.fleet:
        fleet(arguments, Setup(card, itl, TTFT_STEPS * itl, window=arguments.window), known["coserve"])
        return
    chosen = arguments.policy or list(known)
    if unknown := [name for name in chosen if name not in known]:
        options.error(f"no such policy: {unknown[0]}; there are {', '.join(known)}")
    recorded = read_trace(arguments.trace) if arguments.trace else []
    arrivals = "replay" if recorded else arguments.arrivals
    case = Case(
        setup=Setup(card, itl, TTFT_STEPS * itl, window=arguments.window, blocks=16384, max_running=256),
        seconds=arguments.seconds + WARM_UP,
        seeds=arguments.seeds,
        lengths=Lengths(arguments.prompt, arguments.new_tokens, arguments.spread),
        population=Population(arguments.tenants, arguments.adapters, arguments.power),
        arrivals=arrivals,
        load={"closed": arguments.streams, "replay": arguments.times}.get(arrivals, arguments.rate),
        cv=arguments.cv,
        jobs=[TrainingJob(f"job-{i}", tenant=f"t{i}") for i in range(arguments.jobs)],
        faults=_faults(arguments.fault, arguments.seconds),
        recorded=recorded,
    )
    say("training alone, serving alone")
    alone, best = baseline(case, known["coserve"])
    found: dict[str, dict[str, Any]] = {}
    served: dict[str, dict[str, float]] = {}
    for name in chosen:
        say(name)
        ledgers = [case.run(known[name], seed) for seed in range(case.seeds)]
        found[name], served[name] = row(case, ledgers, alone, best), service(ledgers[0])
    if arguments.plot:
        plot(arguments.plot, served, found)
    kinds = {"closed": f"{case.load:g} streams", "replay": f"{arguments.trace} {case.load:g} times as fast"}
    what = kinds.get(arrivals, f"{case.load:g} requests/s ({arrivals})")
    report = Report(
        f"Simulated: {card.name}, {what}, {arguments.jobs} job(s), promise {itl * 1e3:.0f} ms between tokens",
        ["policy", *next(iter(found.values()))],
        {"date": today(), "commit": commit(), "seeds": str(case.seeds), "seconds each": f"{arguments.seconds:g}"},
        rows=[[name, *map(_cell, values.items())] for name, values in found.items()],
        notes=[f"Training alone: {alone:.0f} tokens/s. Best load alone: {_best(best, case.arrivals)}."],
        figures={"training_alone": alone, "best_alone": best, "promise_s": itl, "policies": found},
    )
    report.emit(arguments.json)


def fleet(arguments: argparse.Namespace, setup: Setup, make: Callable[[], Any]) -> None:
    """Engines needed, with requests sent to the engine that holds their adapter, and without."""
    demand = Demand(
        arguments.tenants, arguments.adapters, arguments.rate, arguments.power,
        cv=arguments.cv if arguments.arrivals == "gamma" else 1.0,
        lengths=Lengths(arguments.prompt, arguments.new_tokens, arguments.spread),
        jobs=arguments.jobs, training=arguments.training,
    )  # fmt: skip
    found = {}
    began = time.monotonic()
    for name, affine in (("by adapter", True), ("to any engine", False)):
        say(f"requests go {name}")
        found[name] = engines_needed(make, setup, demand, affine=affine, seconds=arguments.seconds)
    Report(
        f"Simulated fleet: {setup.card.name}, {demand.tenants} tenants with {demand.adapters} adapters each, "
        f"{demand.rate:g} requests/s, {demand.jobs} job(s), promise {setup.itl * 1e3:.0f} ms between tokens",
        ["requests go", "engines", "requests/s of the busiest", "mean", "adapters of one engine, at most",
         "requests inside both, worst engine", "all", "training tokens/s, all", "engines simulated",
         "wrong by, requests", "tokens/s an engine"],
        {"date": today(), "commit": commit(), "first token": f"{setup.ttft:.2f} s",
         "places for adapters": str(setup.max_adapters), "seconds each": f"{arguments.seconds:g}",
         "minutes for the table": f"{(time.monotonic() - began) / 60:.1f}"},
        rows=[
            [name, f.engines, f.busiest_rate, f.mean_rate, f.most_adapters,
             *(_cell(("inside", x)) for x in (f.worst_attainment, f.attainment)), f.training_rate, f.simulated,
             _cell(("inside", f.error)), f.training_error]
            for name, f in found.items()
        ],
        notes=["Some engines were simulated to judge the others by, then three of these as well: the last two columns "
               "say by how much the judgement was wrong, at most and on average. A fleet is large enough "
               "when 99% of all requests are inside both promises, on every engine that was simulated too (to two "
               "standard errors), and all jobs together train as fast as asked."],
        figures={name: asdict(f) for name, f in found.items()},
    ).emit(arguments.json)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--card", choices=list(cards()), default="cpu-270m")
    options.add_argument(
        "--fit", type=Path, metavar="FILE", help="scale the card to a saved GET /v1/coserve/iterations"
    )
    options.add_argument("--arrivals", choices=["closed", "poisson", "gamma", "bursts", "diurnal"], default="closed")
    options.add_argument("--trace", type=Path, metavar="CSV", help="replay it (columns as BurstGPT's or Azure's)")
    options.add_argument("--times", type=float, default=1.0, help="as fast as it was recorded")
    options.add_argument("--streams", type=int, default=4, help="clients of a closed loop")
    options.add_argument("--rate", type=float, default=0.5, help="requests a second of the other arrivals")
    options.add_argument("--cv", type=float, default=4.0, help="coefficient of variation of gamma's gaps")
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--prompt", type=int, default=64, help="prompt tokens, on average")
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--spread", type=float, default=0.3, help="of the logarithm of both")
    options.add_argument("--tenants", type=int, default=1)
    options.add_argument("--adapters", type=int, default=0, help="of every tenant")
    options.add_argument("--power", type=float, default=1.0, help="of the popularity of tenants and adapters")
    options.add_argument("--promise", type=float, default=ITL_STEPS, help="between tokens, in steps of four streams")
    options.add_argument("--itl-ms", type=float, help="the same in milliseconds")
    options.add_argument("--window", type=int, default=256, help="rows of a training unit, at most")
    options.add_argument("--seconds", type=float, default=120.0, help="virtual, after a warm-up")
    options.add_argument("--seeds", type=int, default=4)
    options.add_argument("--fault", choices=["slow", "memory", "restart"], action="append", default=[])
    options.add_argument("--policy", action="append", metavar="NAME", help="only these [all]")
    options.add_argument("--fleet", action="store_true", help="how many engines do --rate and --jobs of all need?")
    options.add_argument("--training", type=float, default=0.0, help="tokens/s that a fleet's jobs are to have, all")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the comparison (needs matplotlib)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return options


def _faults(kinds: Sequence[str], seconds: float) -> list[Fault]:
    at = WARM_UP + seconds / 2
    made: dict[str, list[Fault]] = {
        "slow": [Slowdown(WARM_UP + t, 3.0, 1.5) for t in range(5, int(seconds), 20)],
        "memory": [MemoryPressure(at, seconds / 4, 0.95)],
        "restart": [Restart(at, 20.0)],
    }
    return [fault for kind in kinds for fault in made[kind]]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return statistics.mean(there) if there else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _cell(item: tuple[str, Any]) -> object:
    name, value = item
    return f"{100 * value:.1f}%" if value is not None and "inside" in name else value


def _best(best: float | None, arrivals: str) -> str:
    if best is None:
        return "none keeps 99% of requests inside both promises"
    unit = {"closed": "tokens/s", "replay": "times as fast"}.get(arrivals, "requests/s")
    return f"{best:.3g} {unit}"


if __name__ == "__main__":
    main()
