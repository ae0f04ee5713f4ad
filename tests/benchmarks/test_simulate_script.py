"""The simulator's script at toy size: its table hangs together, repeats, and says what is missing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "simulate.py"
SHORT = ("--seconds=15", "--seeds=2", "--policy=coserve", "--policy=inference only")


def run(tmp_path: Path, *arguments: str) -> tuple[str, dict]:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"--json={figures}", *SHORT, *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, json.loads(figures.read_text())


def test_the_table_and_the_figures_agree_and_repeat(tmp_path: Path) -> None:
    output, figures = run(tmp_path)
    rows = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|")][2:]
    assert rows == list(figures["policies"]) == ["coserve", "inference only"]
    ours, idle = figures["policies"].values()
    assert ours["retention"] == pytest.approx(ours["training tokens/s"] / figures["training_alone"])
    assert ours["gain"] == pytest.approx(ours["retention"] + ours["output tokens/s"] / figures["best_alone"])
    assert idle["training tokens/s"] == 0.0 and idle["output tokens/s"] > ours["output tokens/s"] > 0.0
    assert figures["promise_s"] == pytest.approx(0.150, abs=0.004), "four decode steps of four streams"
    again = run(tmp_path)[1]
    assert {**again, "machine": None} == {**figures, "machine": None}


def test_arrivals_tenants_and_faults(tmp_path: Path) -> None:
    output, figures = run(
        tmp_path, "--arrivals=bursts", "--rate=0.4", "--tenants=20", "--adapters=2", "--fault=slow",
        "--fault=memory", "--fault=restart", "--jobs=2",
    )  # fmt: skip
    assert "0.4 requests/s (bursts), 2 job(s), promise 152 ms" in output
    assert figures["policies"]["coserve"]["load"] == pytest.approx(0.4 / figures["best_alone"])


def test_a_fleet_for_many_tenants(tmp_path: Path) -> None:
    output, figures = run(tmp_path, "--fleet", "--tenants=200", "--adapters=1", "--rate=7", "--jobs=4")
    rows = {cells[1].strip(): cells[2:] for line in output.splitlines() if len(cells := line.split("|")) > 3}
    for name in ("by adapter", "to any engine"):
        assert int(rows[name][0]) == figures[name]["engines"] > 1
        assert figures[name]["attainment"] >= 0.99 and figures[name]["holds"]
    assert figures["by adapter"]["most_adapters"] < figures["to any engine"]["most_adapters"] == 200


@pytest.mark.parametrize(
    "header, first, second",
    [
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", "5.0,x,40,9,49,y", "8.5,x,30,5,35,y"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,40,9", "2023-11-16 18:15:50.18,30,5"),
    ],
)
def test_a_recorded_trace_is_replayed(tmp_path: Path, header: str, first: str, second: str) -> None:
    failed = first.replace("40,9", "40,0")
    (tmp_path / "trace.csv").write_text("\n".join([header, second, first, failed]) + "\n")
    output, figures = run(tmp_path, f"--trace={tmp_path / 'trace.csv'}", "--times=0.2", "--jobs=0")
    assert "0.2 times as fast" in output
    # At seconds 0 and 17.5, the second one after the warm-up: five tokens in the 15 seconds that count.
    assert figures["policies"]["coserve"]["output tokens/s"] == pytest.approx(5 / 15)


def test_a_card_is_fitted_to_recorded_iterations(tmp_path: Path) -> None:
    kinds = {"decode": 4, "prefill": 0, "train_forward": 0, "head": 0, "train_backward": 0}
    record = {"seq": 1, "tokens": kinds, "measured_s": 2 * 0.0379}
    (tmp_path / "iterations.json").write_text(json.dumps({"object": "list", "data": [record] * 40}))
    output, figures = run(tmp_path, f"--fit={tmp_path / 'iterations.json'}", "--jobs=0")
    assert "two cores, 270M, float32, fitted" in output
    assert figures["promise_s"] == pytest.approx(0.303, rel=0.02), "decode steps twice as long"


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    for arguments, message in (
        (["--policy=nobody"], "no such policy: nobody; there are coserve"),
        (["--trace", str(SCRIPT)], "not a trace with timestamp"),
        (["--fit", str(SCRIPT)], "not an answer of GET /v1/coserve/iterations"),
        (["--plot", str(tmp_path / "p.png")], "--plot needs matplotlib"),
    ):
        if "--plot" in arguments and importlib.util.find_spec("matplotlib"):
            continue
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *SHORT, *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
