"""Every kernel under compute-sanitizer's racecheck: no two threads of a program in each other's shared memory.

What programs do to one another in the GPU's memory it does not see; `test_races_triton.py` looks for that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_two_threads_race_for_shared_memory():
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    # Its own process alone: Triton starts an assembler for each kernel.
    watched = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1"]
    watched += ["--target-processes", "application-only"]
    command = [*watched, sys.executable, "-P", "-m", "kernel_calls"]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=path), capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
