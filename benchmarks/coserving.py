"""Co-serving: what four streams and a finetuning job keep of each other's speed, and what the streams' latency pays.

    python benchmarks/coserving.py --model FOLDER [--json FILE]

One server with its own default promises. Four clients send one request after another (prompts of 64 tokens on
average, 64 new tokens each) over HTTP; the job trains LoRA of rank 16 on all linear layers, sequences of 256 tokens
of which 64 bear a loss. Rounds of: streams alone, job alone, both. Then more and more streams alone, for the largest
load inside the promise; then streams, and streams with the job, beside a process that keeps one core busy.

Retention is training tokens/s beside the streams ÷ alone. Load is the streams' tokens/s beside the job ÷ the engine's
best alone with 99% of requests inside both promises (first token; seconds a token after it). Taking turns cannot bring
their sum above 1. Latencies are taken at the client; training tokens are those of completed steps.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from harness import Report, load_average, machine, median, parser, percentile, ratio, say, weight_shapes
from live import Job, Load, Server, random_prompts, step_rate, training_rows

ITL, TTFT = "coserve_slo_itl_seconds", "coserve_slo_ttft_seconds"
IN_SLO, WITH_STREAMS = "coserve_iterations_in_slo_total", "coserve_iterations_with_streams_total"
ATTAINMENT = 0.99


@dataclass
class Phase:
    """What one kind of phase brought, over all its rounds."""

    tokens_per_second: list[float] = field(default_factory=list)  # of the streams
    training: list[float] = field(default_factory=list)  # tokens/s of the job
    gaps: list[float] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)  # a request: inside both promises
    in_slo: float = 0.0
    with_streams: float = 0.0

    def take(self, load: Load, itl: float, ttft: float) -> None:
        self.tokens_per_second.append(load.tokens_per_second)
        self.gaps += load.gaps
        self.kept += load.kept(itl, ttft)

    @property
    def attainment(self) -> float | None:
        return sum(self.kept) / len(self.kept) if self.kept else None

    def inside(self, promise: float) -> float | None:
        """Share of inter-token latencies within the promise."""
        return sum(gap <= promise for gap in self.gaps) / len(self.gaps) if self.gaps else None

    @property
    def iteration_slo_share(self) -> float | None:
        return self.in_slo / self.with_streams if self.with_streams else None

    def figures(self, promise: float) -> dict[str, Any]:
        return {
            "streams_tokens_per_second": self.tokens_per_second, "training_tokens_per_second": self.training,
            "itl_p50_s": percentile(self.gaps, 0.5), "itl_p99_s": percentile(self.gaps, 0.99),
            "itl_max_s": max(self.gaps, default=None), "itl_samples": len(self.gaps),
            "itl_share_inside": self.inside(promise), "requests": len(self.kept), "slo_attainment": self.attainment,
            "iteration_slo_share": self.iteration_slo_share,
        }  # fmt: skip


class Bench:
    """The server and the shapes of its work."""

    def __init__(self, server: Server, arguments: Any, vocabulary: int) -> None:
        rng = random.Random(0)
        self._server, self._arguments = server, arguments
        self._prompts = random_prompts(rng, arguments.prompt, vocabulary)
        self._rows = training_rows(rng, 64 * arguments.batch, arguments.length, arguments.labels, vocabulary)
        metrics = server.metrics()
        self.itl, self.ttft = metrics[ITL], metrics[TTFT]

    def streams(self, phase: Phase, count: int, seconds: float, job: Job | None = None) -> None:
        """With a job: until it has done three steps beside the streams, at most four times as long."""
        before = self._server.metrics()
        began = len(job.events("step")) if job else 0
        enough = (lambda: len(job.events("step")) - began > self._arguments.steps) if job else (lambda: True)
        load = self._server.load(count, seconds, self._prompts, self._arguments.new_tokens, enough, 3 * seconds)
        phase.take(load, self.itl, self.ttft)
        after = self._server.metrics()
        phase.in_slo += after[IN_SLO] - before[IN_SLO]
        phase.with_streams += after[WITH_STREAMS] - before[WITH_STREAMS]
        if job:
            steps = [s for s in job.events("step") if load.wall_began <= s["created_at"] <= load.wall_ended]
            rate = step_rate(steps)
            if rate is not None:
                phase.training.append(rate)

    def training(self, phase: Phase) -> None:
        with self.job() as job:
            rate = step_rate(job.wait_steps(1 + self._arguments.steps))
            if rate is not None:
                phase.training.append(rate)

    @contextlib.contextmanager
    def job(self) -> Iterator[Job]:
        """A job that has done its first step, and is cancelled at the end."""
        job = self._server.start_job(self._rows, self._arguments.batch, 10**6)
        try:
            job.wait_steps(1)
            yield job
        finally:
            job.cancel()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--streams", type=int, default=4)
    options.add_argument("--prompt", type=int, default=64, help="prompt tokens, on average")
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    options.add_argument("--labels", type=int, default=64)
    options.add_argument("--batch", type=int, default=4, help="sequences of an optimizer step")
    options.add_argument("--steps", type=int, default=3, help="optimizer steps measured, at least")
    options.add_argument("--seconds", type=float, default=60, help="of a phase with streams")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--ladder", type=int, nargs="+", default=[4, 6, 8, 12, 16], help="streams alone")
    options.add_argument("--slo-itl-ms", type=float, help="the promise between tokens [the server's own]")
    arguments = options.parse_args()
    facts = machine(arguments.threads)
    vocabulary = weight_shapes(arguments.model)[1][0]
    limits = {"slo_itl_ms": arguments.slo_itl_ms} if arguments.slo_itl_ms else {}
    names = ("streams alone", "job alone", "streams and job", "streams, busy process beside",
             "streams and job, busy process beside")  # fmt: skip
    alone, job_alone, both, alone_busy, both_busy = phases = [Phase() for _ in names]
    ladder: dict[int, Phase] = {}

    say("starting coserve")
    with Server(arguments.model, arguments.threads, **limits) as server:
        bench = Bench(server, arguments, vocabulary)
        for number in range(arguments.rounds):
            say(f"round {number + 1}: streams alone")
            bench.streams(alone, arguments.streams, arguments.seconds)
            say(f"round {number + 1}: job alone")
            bench.training(job_alone)
            say(f"round {number + 1}: both")
            with bench.job() as job:
                bench.streams(both, arguments.streams, arguments.seconds, job)
        for count in arguments.ladder:
            say(f"{count} streams alone")
            bench.streams(ladder.setdefault(count, Phase()), count, arguments.seconds / 2)
        with busy_process():
            say("busy process: streams alone")
            bench.streams(alone_busy, arguments.streams, arguments.seconds)
            say("busy process: both")
            with bench.job() as job:
                bench.streams(both_busy, arguments.streams, arguments.seconds, job)

    facts["load after"] = load_average()
    promise = bench.itl
    attained = [p for p in (alone, *ladder.values()) if p.attainment is not None and p.attainment >= ATTAINMENT]
    best = max((median(phase.tokens_per_second) or 0.0 for phase in attained), default=None)
    retention = ratio(median(both.training), median(job_alone.training))
    load = ratio(median(both.tokens_per_second), best)
    total = retention + load if retention is not None and load is not None else None
    p99 = {name: percentile(phase.gaps, 0.99) for name, phase in zip(names, phases, strict=True)}

    report = Report(
        f"Co-serving: {arguments.streams} streams and a job, promise {promise * 1e3:.0f} ms between tokens, float32",
        ["phase", "streams tokens/s", "training tokens/s", "ITL P50 ms", "P99 ms", "ITL inside the promise",
         "requests inside both", "iteration_slo_share"], facts,
    )  # fmt: skip
    for name, phase in [*zip(names, phases, strict=True), *((f"{n} streams alone", p) for n, p in ladder.items())]:
        times = [percentile(phase.gaps, share) for share in (0.5, 0.99)]
        report.rows.append(
            [name, median(phase.tokens_per_second), median(phase.training), *(t and 1e3 * t for t in times),
             *map(_percent, (phase.inside(promise), phase.attainment, phase.iteration_slo_share))]
        )  # fmt: skip
    summary = {
        "retention": retention, "load": load, "sum": total, "best_alone_tokens_per_second": best,
        "streams_tokens_kept": ratio(median(both.tokens_per_second), median(alone.tokens_per_second)),
        "p99_with_job_over_promise": ratio(p99[names[2]], promise),
        "p99_with_job_over_without": ratio(p99[names[2]], p99[names[0]]),
        "p99_busy_over_quiet_with_job": ratio(p99[names[4]], p99[names[2]]),
        "p99_busy_over_quiet_streams_alone": ratio(p99[names[3]], p99[names[0]]),
    }  # fmt: skip
    report.notes = ["\n".join(f"- {name.replace('_', ' ')}: {_short(value)}" for name, value in summary.items())]
    if best is None:
        report.notes.append("No number of streams kept 99% of requests inside the promises: there is no load to state.")
    report.figures = {
        "promise_s": promise, "first_token_promise_s": bench.ttft, **summary,
        "phases": {name: phase.figures(promise) for name, phase in zip(names, phases, strict=True)},
        "ladder": {count: phase.figures(promise) for count, phase in ladder.items()},
    }  # fmt: skip
    report.emit(arguments.json)


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
