"""The fairness script at toy size: both tables are there, and say what the claims need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fairness.py"


@pytest.mark.timeout(900)
def test_a_small_tenant_keeps_its_first_tokens_and_service_follows_weights(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seconds=45", "--seeds=1", "--rate=0.6", f"--json={figures}"],
        capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| told apart | and A with 5 jobs |" in done.stdout and "| one queue | 3:1 |" in done.stdout
    found = json.loads(figures.read_text())
    ours, theirs = (found[f"{name}, and A with 5 jobs"]["P95 / alone"] for name in ("told apart", "one queue"))
    assert ours < 0.8 * theirs
    assert found["told apart, 1:1"]["A / B"] == pytest.approx(1.0, rel=0.15)
    assert found["told apart, 3:1"]["A / B"] == pytest.approx(3.0, rel=0.2)
    assert found["one queue, 3:1"]["A / B"] < 2.4
