"""How wrong the latency model is: measured against predicted seconds of recorded iterations, by what they carried.

    python benchmarks/prediction.py FILE [FILE …] [--json FILE]

A FILE is a saved answer of GET /v1/coserve/iterations: of a server that serves and trains, say, and of one that only
serves; their tables stand beside each other. The spread of decode steps alone is the machine's own: nothing that they
do differs from one to the next. "Late" is later than the upper estimate that the plan held against its budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Report, commit, percentile
from recorded import read_iterations

FAR = 1.2


def kind(record: dict[str, Any]) -> str:
    """What an iteration carried beside its decodes."""
    tokens = record["tokens"]
    carried = [name for name, key in (("prompts", "prefill"), ("forward", "train_forward"), ("head", "head"),
                                      ("backward", "train_backward")) if tokens.get(key)]  # fmt: skip
    if record["units"] and not set(carried) & {"forward", "head", "backward"}:
        carried.append("head")  # a batch of label rows is counted when it ends
    if not tokens.get("decode"):
        carried.insert(0, "no decode")
    return " + ".join(carried) or "decode only"


def errors(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Shares and ratios; None without records."""
    ratios = [r["measured_s"] / r["predicted_s"] for r in records]
    beyond = [r["measured_s"] / r["upper_s"] for r in records if r["upper_s"]]
    quartiles = [percentile(ratios, share) for share in (0.25, 0.75)]
    return {
        "median error": percentile([abs(ratio - 1.0) for ratio in ratios], 0.5),
        "spread P75 − P25": None if None in quartiles else quartiles[1] - quartiles[0],  # type: ignore[operator]
        "measured ÷ predicted P90": percentile(ratios, 0.9),
        "P99": percentile(ratios, 0.99),
        "late": sum(b > 1.0 for b in beyond) / len(beyond) if beyond else None,
        "late by more than 20%": sum(b > FAR for b in beyond) / len(beyond) if beyond else None,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    report = Report("Prediction: seconds of an iteration", [], {"commit": commit()})
    for file in arguments.files:
        records = [r for r in read_iterations(file) if r["predicted_s"] > 0.0 and r["measured_s"] > 0.0]
        if not records:
            raise SystemExit(f"{file}: no iteration with a prediction")
        groups: dict[str, list[dict[str, Any]]] = {"all": records}
        for record in records:
            groups.setdefault(kind(record), []).append(record)
        found = {name: errors(group) for name, group in groups.items()}
        report.columns = ["run", "iterations with", "n", *found["all"]]
        order = sorted(groups, key=lambda name: (name != "all", -len(groups[name])))
        report.rows += [[file.stem, name, len(groups[name]), *map(_cell, found[name].items())] for name in order]
        report.figures[file.stem] = {name: {"n": len(groups[name]), **found[name]} for name in order}
    report.emit(arguments.json)


def _cell(item: tuple[str, float | None]) -> object:
    name, value = item
    return f"{100 * value:.1f}%" if value is not None and ("error" in name or "late" in name) else value


if __name__ == "__main__":
    main()
