"""How wrong the latency model is: measured against predicted seconds of iterations, by what they carried.

    python benchmarks/prediction.py FILE [FILE …] [--json FILE]
    python benchmarks/prediction.py --model FOLDER [--promise-ms MS] [--json FILE]

A FILE is a saved answer of GET /v1/coserve/iterations: of a server that serves and trains, say, and of one that only
serves; their tables stand beside each other. With `--model` a server is started, and four streams alone and four
streams beside a finetuning job take turns.

*Error* is |measured − predicted| ÷ measured. "Late" is later than the upper estimate that the plan held against its
budget. Beside them stands what the machine does on its own: decode steps of as many streams are the same work, so how
far they lie from their median is nothing that a prediction could know.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Report, commit, cores, machine, percentile, say, weight_shapes
from live import Server, random_prompts, training_rows
from recorded import read_iterations

FAR = 1.2
AIMS = {"median error": 0.10, "late by more than 20%": 0.01}  # at most
STREAMS, PROMPT, NEW_TOKENS = 4, 64, 64
Records = Sequence[Mapping[str, Any]]


def kind(record: Mapping[str, Any]) -> str:
    """What an iteration carried beside its decodes."""
    tokens = record["tokens"]
    carried = [name for name, key in (("prompts", "prefill"), ("forward", "train_forward"), ("head", "head"),
                                      ("backward", "train_backward")) if tokens.get(key)]  # fmt: skip
    if record["units"] and not set(carried) & {"forward", "head", "backward"}:
        carried.append("head")  # a batch of label rows is counted when it ends
    if not tokens.get("decode"):
        carried.insert(0, "no decode")
    return " + ".join(carried) or "decode only"


def errors(records: Records) -> dict[str, float | None]:
    """Shares and ratios; None without records."""
    ratios = [r["measured_s"] / r["predicted_s"] for r in records]
    beyond = [r["measured_s"] / r["upper_s"] for r in records if r["upper_s"]]
    return {
        "median error": statistics.median([abs(1.0 - 1.0 / ratio) for ratio in ratios]) if ratios else None,
        "measured ÷ predicted P90": percentile(ratios, 0.9),
        "P99": percentile(ratios, 0.99),
        "late": sum(b > 1.0 for b in beyond) / len(beyond) if beyond else None,
        "late by more than 20%": sum(b > FAR for b in beyond) / len(beyond) if beyond else None,
    }


def spread(records: Records) -> dict[str, float | None]:
    """Of iterations that carried nothing but decodes, against the median of those with as many streams: half of them
    are within `half`, and `far` of them took over 1.2 times as long."""
    alike: dict[int, list[float]] = {}
    for record in records:
        if kind(record) == "decode only":
            alike.setdefault(record["tokens"]["decode"], []).append(record["measured_s"])
    ratios = [s / statistics.median(same) for same in alike.values() if len(same) > 1 for s in same]
    if not ratios:
        return {"half": None, "far": None}
    return {
        "half": statistics.median([abs(r - 1.0) for r in ratios]), "far": sum(r > FAR for r in ratios) / len(ratios)
    }  # fmt: skip


def predicted(records: Records) -> list[Mapping[str, Any]]:
    return [r for r in records if r["predicted_s"] > 0.0 and r["measured_s"] > 0.0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", type=Path, nargs="*", metavar="FILE")
    options.add_argument("--model", type=Path, metavar="FOLDER", help="measure a server of this model instead")
    options.add_argument("--promise-ms", type=float, help="between its tokens [its default]")
    options.add_argument("--threads", type=int, default=cores(), help="its CPU threads [all cores]")
    options.add_argument("--seconds", type=float, default=60, help="of a phase")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    options.add_argument("--labels", type=int, default=64)
    options.add_argument("--batch", type=int, default=4, help="sequences of an optimizer step")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    if bool(arguments.files) == bool(arguments.model):
        options.error("say either which recorded iterations to judge, or --model FOLDER")
    facts = machine(arguments.threads) if arguments.model else {"commit": commit()}
    runs = measure(arguments) if arguments.model else {file.stem: read_iterations(file) for file in arguments.files}
    report = Report("Prediction: seconds of an iteration", [], facts)
    for name, records in runs.items():
        judge(report, name, predicted(records))
    report.emit(arguments.json)


def judge(report: Report, run: str, records: Records) -> None:
    """Add a run's rows, its figures and what its note says of the aims."""
    if not records:
        raise SystemExit(f"{run}: no iteration with a prediction")
    groups: dict[str, list[Mapping[str, Any]]] = {"all": list(records)}
    for record in records:
        groups.setdefault(kind(record), []).append(record)
    found, own = {name: errors(group) for name, group in groups.items()}, spread(records)
    report.columns = ["run", "iterations with", "n", *found["all"]]
    order = sorted(groups, key=lambda name: (name != "all", -len(groups[name])))
    report.rows += [[run, name, len(groups[name]), *map(_cell, found[name].items())] for name in order]
    said = [f"{name} {_percent(found['all'][name])}, aim {100 * aim:.0f}%: {_met(found['all'][name], aim)}"
            for name, aim in AIMS.items()]  # fmt: skip
    report.notes.append(
        f"{run}: {'; '.join(said)}. Decode steps of as many streams: half within {_percent(own['half'])} of their "
        f"median, {_percent(own['far'])} more than 20% over it."
    )
    report.figures[run] = {name: {"n": len(groups[name]), **found[name]} for name in order} | {"spread": own}


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The iterations of streams alone and of streams with a job, by turns on one server."""
    rng, vocabulary = random.Random(0), weight_shapes(arguments.model)[1][0]
    prompts = random_prompts(rng, PROMPT, vocabulary)
    rows = training_rows(rng, 64 * arguments.batch, arguments.length, arguments.labels, vocabulary)
    options = {"slo_itl_ms": arguments.promise_ms} if arguments.promise_ms else {}
    found: dict[str, list[dict[str, Any]]] = {"streams alone": [], "streams and job": []}

    def phase(server: Server, name: str) -> None:
        say(name)
        load = server.load(STREAMS, arguments.seconds, prompts, NEW_TOKENS)
        found[name] += server.iterations(load.wall_began, load.wall_ended)

    with Server(arguments.model, arguments.threads, **options) as server:
        for _ in range(arguments.rounds):
            phase(server, "streams alone")
            job = server.start_job(rows, arguments.batch, 10**6)
            try:
                job.wait_steps(1)
                phase(server, "streams and job")
            finally:
                job.cancel()
    return found


def _met(value: float | None, aim: float) -> str:
    return "not measured" if value is None else "met" if value <= aim else "missed"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _cell(item: tuple[str, float | None]) -> object:
    name, value = item
    return _percent(value) if "error" in name or "late" in name else value


if __name__ == "__main__":
    main()
