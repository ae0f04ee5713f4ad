"""What tests of several folders share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """torch computes in one thread: for tiny models, in a process that other tests use with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
