"""What looking ahead at admissions is worth where K/V memory is short, in the simulator: preemptions, tokens/s.

    python benchmarks/admission.py [--case cpu-medium] [--seeds 4] [--json FILE]

No model and no server. Clients in a closed loop send prompts whose outputs differ widely in length and say nothing of
it, to an engine whose K/V blocks hold far fewer streams than there are clients. `reserve` leaves a quarter of a block
for every running request, as the scheduler does while it knows of no lengths; `forecast` is the scheduler as it is.
Figures are means over the seeds, from an engine's first second on, except the latencies, which begin after 10 s.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from harness import Report, commit, say

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Setup, cards, simulate
from coserve.scheduler.simulation import report as judge
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths

WARM_UP = 10.0  # seconds that no latency counts
NEVER = 1 << 60
RULES = {"reserve": NEVER, "forecast": SchedulerConfig().known_outputs}  # outputs seen before lengths count


@dataclass(frozen=True)
class Case:
    card: str
    blocks: int
    clients: int
    lengths: Lengths
    itl: float
    seconds: float


CASES = {
    "cpu-short": Case("cpu-270m", 64, 32, Lengths(64, 48, 0.8), 0.3, 300.0),
    "cpu-medium": Case("cpu-270m", 128, 32, Lengths(64, 192, 0.8), 0.3, 300.0),
    "cpu-long": Case("cpu-270m", 256, 32, Lengths(64, 512, 1.0), 0.3, 600.0),
    "h200": Case("h200-8b", 2048, 256, Lengths(256, 256, 1.0), 0.05, 60.0),
}


def measure(case: Case, known_outputs: int, seed: int) -> tuple[float, ...]:
    setup = Setup(cards()[case.card], case.itl, 10 * case.itl, blocks=case.blocks, max_running=256)
    config = SchedulerConfig(itl_seconds=case.itl, known_outputs=known_outputs)
    workload = ClosedLoop(case.clients, seed, case.lengths, ttft=setup.ttft)
    ledger = simulate(lambda: Scheduler(config), setup, workload, seconds=WARM_UP + case.seconds, seed=seed)
    found = judge(ledger, WARM_UP)
    preemptions, lost = sum(s.preemptions for s in ledger.streams), sum(s.lost for s in ledger.streams)
    return found.output_rate, preemptions, lost, 1e3 * (found.itl_p99 or 0.0), found.ttft_p50 or 0.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--case", choices=list(CASES), action="append", help="only these [all]")
    options.add_argument("--seeds", type=int, default=4)
    options.add_argument("--seconds", type=float, help="virtual, after a warm-up")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = options.parse_args()
    columns = ["case", "blocks", "outputs, mean", "admission by", "output tokens/s", "preemptions",
               "tokens computed again", "ITL P99 ms", "TTFT P50 s"]  # fmt: skip
    report = Report("Simulated: admission where K/V memory is short", columns,
                    {"commit": commit(), "seeds": str(arguments.seeds)})  # fmt: skip
    for name in arguments.case or CASES:
        case = CASES[name]
        if arguments.seconds is not None:
            case = Case(case.card, case.blocks, case.clients, case.lengths, case.itl, arguments.seconds)
        for rule, known in RULES.items():
            say(f"{name}, {rule}")
            runs = [measure(case, known, seed) for seed in range(arguments.seeds)]
            rate, preemptions, lost, itl, ttft = (statistics.mean(values) for values in zip(*runs, strict=True))
            report.rows.append(
                [name, case.blocks, case.lengths.outputs, rule, rate, round(preemptions), round(lost), itl, ttft]
            )
            report.figures[f"{name} {rule}"] = runs
    report.emit(arguments.json)


if __name__ == "__main__":
    main()
