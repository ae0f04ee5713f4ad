"""Activations that have left the device: a sweep's rows in the host's memory, or in a file where that is the device.

A parked sweep comes back to the bit. It may assume that nothing of the sweep changes while it is away, but that jobs
may leave it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.transfer import to_device
from coserve.server.engine.activation_store import ActivationStore, Place


class ParkedRows:
    """What `layers` layers keep of a sweep's first `rows` rows."""

    def __init__(self, store: ActivationStore, layers: int, rows: int, folder: Path, device: torch.device) -> None:
        """Copies at once; the store may be given up afterwards.

        Raises:
            OSError: there is no room for the file in `folder`; nothing has changed.
        """
        self._device = device
        self.lse = store.lse  # where it was: it lies in no block
        whole = sum(t.numel() * t.element_size() for _, t in store.contents(layers, rows))
        space = _space(whole, folder, device)
        self._kept: dict[Place, Tensor] = {}
        at = 0
        for place, values in store.contents(layers, rows):
            size = values.numel() * values.element_size()
            kept = space[at : at + size].view(values.dtype).view(values.shape)
            kept.copy_(values)
            self._kept[place] = kept
            at += size

    def keep_only(self, index: Tensor) -> None:
        """Only these rows (int64, ascending, on the host) stay."""
        self._kept = {place: kept[index[index < len(kept)]] for place, kept in self._kept.items()}
        self.lse = {layer: lse[:, index.to(lse.device)] for layer, lse in self.lse.items()}

    def restore(self, store: ActivationStore) -> None:
        """Into a store of the same rows."""
        for place, kept in self._kept.items():
            store.put_back(place, to_device(kept, self._device))
        store.lse = self.lse


def _space(size: int, folder: Path, device: torch.device) -> Tensor:
    """uint8 [size]"""
    if device.type == "cuda":
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is to be met here, not at a write to the mapping
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))
