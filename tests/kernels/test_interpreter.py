"""The Triton kernels' tests, run on a CPU by Triton's interpreter; a GPU runs the same files with `pytest -m gpu`.

A process of their own, because TRITON_INTERPRET must be set before anything imports Triton (transformers does).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(str(path) for path in HERE.glob("test_*_triton.py"))


@pytest.mark.timeout(900)
def test_kernels_through_the_interpreter():
    assert FILES
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
