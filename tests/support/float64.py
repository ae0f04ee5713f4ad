"""Runs modeling code in float64 throughout: its own casts to float32 are turned into casts to float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Patch `Tensor.float`, `Tensor.to(float32)` and float32 softmax of float64 tensors for the block."""
    plain_to, plain_float, plain_softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def widen(tensor, args, kwargs):
        if tensor.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return args, kwargs

    def to(self, *args, **kwargs):
        args, kwargs = widen(self, args, kwargs)
        return plain_to(self, *args, **kwargs)

    def as_float(self, *args, **kwargs):
        return self if self.dtype == torch.float64 else plain_float(self, *args, **kwargs)

    def softmax(input, *args, **kwargs):
        args, kwargs = widen(input, args, kwargs)
        return plain_softmax(input, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, as_float, softmax
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = plain_to, plain_float, plain_softmax
