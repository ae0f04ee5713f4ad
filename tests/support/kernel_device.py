"""What tests of Triton kernels share: the device, seeds that print themselves, poisoned memory, relative errors.

Such tests bear the mark `gpu`. On a GPU they run with `pytest -m gpu`; everywhere else `test_interpreter.py` runs
the same files in a process of their own with TRITON_INTERPRET=1, which must be set before Triton is imported.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernel_device() -> torch.device:
    """The CPU under the interpreter, else the GPU; skips where there is neither."""
    if INTERPRETED:
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


def fresh_seed() -> int:
    """On a GPU a new seed every run, elsewhere always the same; it is printed, and KERNEL_SEED=N repeats one."""
    new = random.SystemRandom().randrange(2**31) if torch.cuda.is_available() and not INTERPRETED else 1
    seed = int(os.environ.get("KERNEL_SEED") or new)
    print(f"KERNEL_SEED={seed}")
    return seed


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers: what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        assert torch.empty(7).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


@contextmanager
def reversed_programs() -> Iterator[None]:
    """The interpreter runs a launch's programs last to first: a result that depends on their order changes."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forward = builder.set_grid_idx
    builder.set_grid_idx = lambda *place: forward(*(n - 1 - i for n, i in zip(builder.grid_dim, place, strict=True)))
    try:
        yield
    finally:
        del builder.set_grid_idx


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in float64; NaN anywhere gives NaN, which is below no bound."""
    return float((got.double() - want.double()).norm() / want.double().norm())
