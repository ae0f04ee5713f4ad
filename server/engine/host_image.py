"""An adapter in the host's memory: as a folder's reader gives it, or laid out in pages, ready for one copy.

An image is made beside the iterations, by the thread that reads folders; it knows of a pool only page size and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from coserve.server.training.peft.lora import LoraPair


class LowRank(Protocol):
    """One adapter at one site: y += (x Aᵀ) B · scaling with a [r, in], b [r, out]."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...


Weights = Mapping[str, LowRank]  # site name -> its pair


class HostImage(dict[str, LoraPair]):
    """Weights whose tensors are views of `pages` [n, page_elements]: each on whole pages, A before B, in their order,
    zeros behind it. Scaling is folded into B."""

    def __init__(self, weights: Weights, page_elements: int, dtype: torch.dtype, *, pinned: bool) -> None:
        super().__init__()
        tensors = [t for pair in weights.values() for t in (pair.a, pair.b)]
        counts = [-(-t.numel() // page_elements) for t in tensors]
        self.pages = torch.zeros(sum(counts), page_elements, dtype=dtype, pin_memory=pinned)
        flat, first = self.pages.view(-1), 0
        views = []
        for tensor in (t for pair in weights.values() for t in folded(pair)[:2]):
            view = flat[first : first + tensor.numel()].view(tensor.shape)
            views.append(view.copy_(tensor))
            first += -(-tensor.numel() // page_elements) * page_elements
        for name, a, b in zip(weights, views[::2], views[1::2], strict=True):
            self[name] = LoraPair(a, b)


def folded(pair: LowRank) -> tuple[Tensor, Tensor, float]:
    """A, B · scaling, 1."""
    # In at least float32, so that B is rounded to the pool's dtype once.
    return pair.a, pair.b.to(torch.promote_types(pair.b.dtype, torch.float32)) * pair.scaling, 1.0


def weights_bytes(weights: Weights) -> int:
    """Of the host's memory."""
    if isinstance(weights, HostImage):
        return weights.pages.numel() * weights.pages.element_size()
    return sum(t.numel() * t.element_size() for pair in weights.values() for t in (pair.a, pair.b))
