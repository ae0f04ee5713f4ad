"""Every kernel again and again on the same inputs: whatever runs first, and whatever memory held, the bits are equal.

A program that reads what another of the same launch writes, or memory that nobody wrote, is what this would catch.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from kernel_calls import CALLS
from kernel_device import INTERPRETED, fresh_seed, kernel_device, reversed_programs

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

# A GPU runs programs in an order of its own, and needs enough of them; the interpreter runs them backwards once.
REPEATS, TIMES = (1, 1) if INTERPRETED else (50, 16)


def bits(t):
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(name):
    seed, device = fresh_seed(), kernel_device()
    call = CALLS[name](device, seed, TIMES)
    first = call()
    assert all(t.isfinite().all() and t.any() for t in first)
    for _ in range(REPEATS):
        with reversed_programs() if INTERPRETED else nullcontext():
            again = call()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))
