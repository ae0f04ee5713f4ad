"""The LoRA term in plain torch: for every segment of rows, y += s (x Aᵀ) B with that segment's own adapter.

A and B are rank rows, A [r, in] and B [r, out], as they lie in the adapter pool; rows outside every segment
are base-only and cost nothing. Differentiable in x, y, A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows [start, end) of the packed batch use this adapter's pair at the site at hand."""

    start: int
    end: int
    a: Tensor  # [r, in]
    b: Tensor  # [r, out]
    scaling: float
    dropout: Callable[[Tensor], Tensor] | None = None  # applied to the rows of x before A, in training


def lora_add(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    """y [T, out] + LoRA terms of x [T, in]. Segments are ascending and disjoint. Returns a new tensor under
    autograd; without it y is changed in place and returned."""
    if torch.is_grad_enabled() and (y.requires_grad or any(s.a.requires_grad for s in segments)):
        return _differentiable(y, x, segments)
    for s in segments:
        y[s.start : s.end].addmm_(_shrink(x, s), s.b, alpha=s.scaling)
    return y


def _differentiable(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    pieces, row = [], 0
    for s in segments:
        if s.start > row:
            pieces.append(y[row : s.start])
        pieces.append(torch.addmm(y[s.start : s.end], _shrink(x, s), s.b, alpha=s.scaling))
        row = s.end
    if row < y.shape[0]:
        pieces.append(y[row:])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _shrink(x: Tensor, s: LoraSegment) -> Tensor:
    rows = x[s.start : s.end]
    return (rows if s.dropout is None else s.dropout(rows)) @ s.a.t()
