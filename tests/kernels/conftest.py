"""Without Triton, which has wheels for Linux only, there is nothing to test of its kernels."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*_triton.py", "test_interpreter.py", "test_kernels_compile.py"]
