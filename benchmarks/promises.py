"""Whether the scheduler keeps promises of several lengths, what training has of the rest, and how well it predicts.

    python benchmarks/promises.py --model FOLDER [--json FILE]

Four streams and a finetuning job under promises of 1.25, 1.5, 2 and 4 times the decode step, each on a server of its
own; streams alone and streams with the job take turns. *Inside* is the share of iterations with a running stream that
end within the promise. The share of time that is inference's is the streams' tokens/s beside the job ÷ alone; *kept* is
what the job has of the rest: its tokens/s ÷ (its tokens/s alone x the rest). *Kept, same units* divides by the job's
speed alone in units of the same size instead, which a server has whose promise is shorter by the decode step.

*Error* is the median of |measured - predicted| ÷ measured over the iterations of streams and job, *far over* the share
of them that took over 1.2 times the upper bound that the plan was filled up to. Beside them, *decode steps' own*: how
far those of the streams alone are from the median of as many streams, and the share of them over 1.2 times that.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from typing import Any

from harness import Report, load_average, machine, median, parser, percentile, ratio, say, weight_shapes
from live import Server, random_prompts, step_rate, training_rows
from prediction import errors, predicted, spread

STREAMS, NEW_TOKENS, PROMPT = 4, 64, 64
Iteration = dict[str, Any]


@dataclass
class Shapes:
    """Of the work that all servers are given."""

    batch: int
    length: int
    labels: int
    vocabulary: int

    def __post_init__(self) -> None:
        rng = random.Random(0)
        self.prompts = random_prompts(rng, PROMPT, self.vocabulary)
        self.rows = training_rows(rng, 64 * self.batch, self.length, self.labels, self.vocabulary)


@dataclass
class Part:
    """What phases of one kind brought, over all rounds."""

    streams: list[float] = field(default_factory=list)  # tokens/s
    training: list[float] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)

    @property
    def with_streams(self) -> list[Iteration]:
        return [record for record in self.iterations if record["streams"]]

    @property
    def inside(self) -> float | None:
        found = self.with_streams
        return sum(r["measured_s"] <= r["slo_budget_s"] for r in found) / len(found) if found else None

    @property
    def p99(self) -> float | None:
        return percentile([r["measured_s"] for r in self.with_streams], 0.99)

    @property
    def error(self) -> float | None:
        return errors(predicted(self.iterations))["median error"]

    @property
    def far_over(self) -> float | None:
        return errors(predicted(self.iterations))["late by more than 20%"]

    @property
    def spread(self) -> dict[str, float | None]:
        return spread(self.iterations)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=["promises", "burst"], nargs="+", default=["promises", "burst"])
    options.add_argument(
        "--promises", type=float, nargs="+", default=[1.25, 1.5, 2, 4], metavar="X", help="decode steps"
    )
    options.add_argument("--seconds", type=float, default=30, help="of a phase with streams")
    options.add_argument("--steps", type=int, default=2, help="optimizer steps of a phase with a job, at least")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    options.add_argument("--labels", type=int, default=64)
    options.add_argument("--batch", type=int, default=4, help="sequences of an optimizer step")
    arguments = options.parse_args()
    shapes = Shapes(arguments.batch, arguments.length, arguments.labels, weight_shapes(arguments.model)[1][0])
    promises(arguments, shapes).emit(arguments.json)


def promises(arguments: Any, shapes: Shapes) -> Report:
    facts = machine(arguments.threads)
    step = decode_step(arguments, shapes)
    report = Report(
        f"Promises: {STREAMS} streams and a job, decode step {1e3 * step:.1f} ms",
        ["promise, decode steps", "ms", "inside, streams alone", "inside, with the job", "P99 ms, alone",
         "P99 ms, with", "streams tokens/s, alone", "with", "training tokens/s, alone", "with",
         "inference's share of time", "kept", "kept, same units", "error", "far over", "decode steps' own error",
         "far over "], facts,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for factor in arguments.promises:
        say(f"promise of {factor} decode steps")
        alone, both, job_alone, same_units = (Part() for _ in range(4))
        with Server(arguments.model, arguments.threads, slo_itl_ms=1e3 * factor * step) as server:
            for _ in range(arguments.rounds):
                _streams(server, shapes, alone, arguments.seconds)
                _job(server, shapes, job_alone, arguments.steps)
                _both(server, shapes, both, arguments)
        with Server(arguments.model, arguments.threads, slo_itl_ms=1e3 * (factor - 1) * step) as server:
            _job(server, shapes, same_units, arguments.steps)
        share = ratio(median(both.streams), median(alone.streams))
        rest = None if share is None else 1 - share
        kept, kept_same = (
            ratio(ratio(median(both.training), median(part.training)), rest) for part in (job_alone, same_units)
        )
        report.rows.append(
            [f"{factor:g}", 1e3 * factor * step, _percent(alone.inside), _percent(both.inside), *map(_ms, (alone.p99,
             both.p99)), median(alone.streams), median(both.streams), median(job_alone.training), median(both.training),
             _percent(share), _percent(kept), _percent(kept_same), _percent(both.error), _percent(both.far_over),
             *map(_percent, alone.spread.values())]
        )  # fmt: skip
        parts = {"streams alone": alone, "job alone": job_alone, "both": both, "job alone, same units": same_units}
        figures[f"{factor:g}"] = {
            "promise_s": factor * step, "kept": kept, "kept_same_units": kept_same, "inference_share": share,
            **{name: _figures(part) for name, part in parts.items()},
        }  # fmt: skip
    facts["load after"] = load_average()
    report.figures = {"decode_step_s": step, "promises": figures}
    return report


def decode_step(arguments: Any, shapes: Shapes) -> float:
    """Median seconds of an iteration that carries one token of each stream, and nothing else."""
    part = Part()
    with Server(arguments.model, arguments.threads) as server:
        _streams(server, shapes, part, arguments.seconds)
    steps = [r["measured_s"] for r in part.iterations if r["tokens"]["decode"] == STREAMS and _only(r, "decode")]
    if not steps:
        raise SystemExit("no iteration carried one token of each stream and nothing else: measure for more --seconds")
    return statistics.median(steps)


def _streams(server: Server, shapes: Shapes, part: Part, seconds: float) -> None:
    load = server.load(STREAMS, seconds, shapes.prompts, NEW_TOKENS)
    part.streams.append(load.tokens_per_second)
    part.iterations += server.iterations(load.wall_began, load.wall_ended)


def _job(server: Server, shapes: Shapes, part: Part, steps: int) -> None:
    job = server.start_job(shapes.rows, shapes.batch, 10**6)
    try:
        rate = step_rate(job.wait_steps(1 + steps))
        if rate is not None:
            part.training.append(rate)
    finally:
        job.cancel()


def _both(server: Server, shapes: Shapes, part: Part, arguments: Any) -> None:
    job = server.start_job(shapes.rows, shapes.batch, 10**6)
    try:
        job.wait_steps(1)
        before = len(job.events("step"))

        def enough() -> bool:
            return len(job.events("step")) - before > arguments.steps

        load = server.load(STREAMS, arguments.seconds, shapes.prompts, NEW_TOKENS, enough, 3 * arguments.seconds)
        part.streams.append(load.tokens_per_second)
        part.iterations += server.iterations(load.wall_began, load.wall_ended)
        rate = step_rate([s for s in job.events("step") if load.wall_began <= s["created_at"] <= load.wall_ended])
        if rate is not None:
            part.training.append(rate)
    finally:
        job.cancel()


# --------------------------------------------------------------------------- the report


def _only(record: Iteration, kind: str) -> bool:
    return not record["units"] and all(count == 0 for name, count in record["tokens"].items() if name != kind)


def _figures(part: Part) -> dict[str, Any]:
    return {
        "streams_tokens_per_second": part.streams, "training_tokens_per_second": part.training,
        "iterations": len(part.iterations), "inside": part.inside, "p99_s": part.p99, "error": part.error,
        "far_over": part.far_over, "spread": part.spread,
    }  # fmt: skip


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


if __name__ == "__main__":
    main()
