"""Small host tensors on their way to a device, without the host waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on `device`; the same object where that is the CPU.

    From pinned memory: a copy of pageable memory waits until the device's queue has come to it. The allocator of
    pinned memory gives a block out again only after the copies from it are through.
    """
    if torch.device(device).type != "cuda" or not values.numel():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def integers(values: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.int32) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)
