"""The admission script with one seed: the forecast takes fewer blocks back, and loses no tokens by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "admission.py"


@pytest.mark.timeout(900)
def test_the_forecast_preempts_less_and_makes_as_many_tokens(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--case=cpu-medium", "--seconds=300", "--seeds=1", f"--json={figures}"],
        capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| cpu-medium | 128 | 192 | forecast |" in done.stdout
    found = json.loads(figures.read_text())
    for (rate, preemptions, lost, *_), (before, were, had, *_) in zip(
        found["cpu-medium forecast"], found["cpu-medium reserve"], strict=True
    ):
        assert preemptions < 0.6 * were and lost < 0.7 * had
        assert rate > 0.97 * before
