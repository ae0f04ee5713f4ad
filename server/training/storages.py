"""How much memory tensors really take: that of the storages behind them, each counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Bytes on this kind of device behind these tensors, views of one storage together once; None counts nothing."""
    sizes: dict[int, int] = {}  # by address
    for tensor in tensors:
        if tensor is None or tensor.device.type != device.type:
            continue
        if tensor.is_mkldnn:  # oneDNN's own layout, which is padded and has no storage that torch knows
            sizes[torch.ops.mkldnn.data_ptr(tensor)] = torch.ops.mkldnn._nbytes(tensor)
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
