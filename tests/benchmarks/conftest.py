"""A tiny model for the benchmarks' smoke tests, and a way to run one as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("bench") / "tiny", "gemma3_text")


@pytest.fixture
def run_benchmark(bench_model: Path, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """run(script, *arguments) -> (standard output, the figures)"""

    def run(script: str, *arguments: object) -> tuple[str, dict[str, Any]]:
        figures = tmp_path / "figures.json"
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / script), f"--model={bench_model}", "--threads=1", f"--json={figures}",
             *map(str, arguments)],
            capture_output=True, text=True, timeout=880,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout, json.loads(figures.read_text())

    return run
