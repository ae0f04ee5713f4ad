"""The engine on its Triton backend, on a CPU by Triton's interpreter; a GPU runs the same file with `pytest -m gpu`.

A process of their own, because TRITON_INTERPRET must be set before anything imports Triton (transformers does).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")
def test_the_engine_through_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    files = sorted(str(path) for path in HERE.glob("test_*_triton.py"))
    command = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
