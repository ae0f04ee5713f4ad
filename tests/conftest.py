"""What tests of several folders share."""

from __future__ import annotations

import contextlib

import pytest
import torch

with contextlib.suppress(ImportError):  # a machine with a GPU runs the kernels' tests without it
    from hypothesis import HealthCheck, settings

    # The same examples in every run, as in the scheduler's property tests; however slow the machine draws them.
    settings.register_profile("repeatable", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("repeatable")


@pytest.fixture
def one_thread():
    """torch computes in one thread: for tiny models, in a process that other tests use with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
