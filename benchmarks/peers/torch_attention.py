"""Causal attention of several sequences as torch itself does it: its flash kernel, in one call where torch has that.

A sequence's queries are the last rows of its keys. Inputs are made beforehand in the layout that each way wants.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None


class OneCall:
    """torch's varlen_attn. Raises RuntimeError where there is none: an older torch, no CUDA."""

    name = "varlen_attn"

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: Sequence[tuple[int, int]]) -> None:
        """q and grad [Hq, T, D], k and v [Hkv, N, D]; lengths: (queries, keys) of each sequence, in their order."""
        if varlen_attn is None or not q.is_cuda:
            raise RuntimeError("there is no varlen_attn here")
        self._inputs = [t.transpose(0, 1).contiguous().requires_grad_() for t in (q, k, v)]
        self._grad = grad.transpose(0, 1).contiguous()
        parts = [list(part) for part in zip(*lengths, strict=True)]
        self._ends = [torch.tensor([0, *itertools.accumulate(p)], dtype=torch.int32, device=q.device) for p in parts]
        self._most = [max(part) for part in parts]

    def forward(self) -> Tensor:
        """[T, Hq, D]"""
        return varlen_attn(*self._inputs, *self._ends, *self._most, window_size=(-1, 0), enable_gqa=True)

    def both(self) -> Sequence[Tensor]:
        """Forward, and the gradients of q, k and v in this layout."""
        return torch.autograd.grad(self.forward(), self._inputs, self._grad)

    def results(self) -> list[Tensor]:
        """out, dq, dk, dv, each [heads, rows, D]"""
        return [t.transpose(0, 1) for t in (self.forward().detach(), *self.both())]


class OneByOne:
    """torch's scaled_dot_product_attention, one call a sequence; on a GPU the flash kernel and no other."""

    name = "scaled_dot_product_attention, one sequence at a time"

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: Sequence[tuple[int, int]]) -> None:
        """As above."""
        queries, keys = (list(part) for part in zip(*lengths, strict=True))
        self._sequences = [
            [part[None].contiguous().requires_grad_() for part in sequence]
            for sequence in zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
        ]
        self._inputs = [part for sequence in self._sequences for part in sequence]
        self._grads = [part[None].contiguous() for part in grad.split(queries, 1)]
        self._masks = [None if rows == seen else _lower_right(rows, seen, q.device) for rows, seen in lengths]

    def forward(self) -> list[Tensor]:
        """Of each sequence, [1, Hq, rows, D]."""
        flash = self._inputs[0].is_cuda
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext():
            return [
                F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
                for parts, mask in zip(self._sequences, self._masks, strict=True)
            ]

    def both(self) -> Sequence[Tensor]:
        """Forward, and the gradients of q, k and v of each sequence."""
        return torch.autograd.grad(self.forward(), self._inputs, self._grads)

    def results(self) -> list[Tensor]:
        """As above."""
        grads = self.both()
        parts = ([part.detach() for part in self.forward()], grads[0::3], grads[1::3], grads[2::3])
        return [torch.cat([part[0] for part in of_one], 1) for of_one in parts]


def _lower_right(rows: int, keys: int, device: torch.device) -> Tensor:
    """The last of the rows sees all keys. On a GPU a bias that the flash kernel knows, elsewhere a mask."""
    if device.type == "cuda":
        return causal_lower_right(rows, keys)
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
