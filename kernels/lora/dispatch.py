"""The one function that adds LoRA terms: plain torch for pairs at hand and on a CPU, Triton for pages on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coserve.kernels.lora import reference
from coserve.kernels.lora.pages import PagedTerms
from coserve.kernels.lora.reference import LoraSegment


def lora_add(y: Tensor, x: Tensor, terms: Sequence[LoraSegment] | PagedTerms) -> Tensor:
    """y [T, out] + LoRA terms of x [T, in]; rows outside every segment or range stay as they are.

    Segments carry their pairs as tensors and are ascending and disjoint. Paged terms read the adapter pool in
    place; out is then the sum over the launch's sites. Differentiable in x, y and what gradients are wanted
    for: the segments' pairs, or the paged terms' perturbations.

    Returns:
        A new tensor under autograd; without it y, changed in place.
    """
    if not isinstance(terms, PagedTerms):
        return reference.lora_add(y, x, terms)
    if y.is_cuda:
        # Here and not above: an installation without a GPU has no Triton.
        from coserve.kernels.lora.function import paged_lora_add

        return paged_lora_add(y, x, terms)
    return _plain(y, x, terms)


def _plain(y: Tensor, x: Tensor, terms: PagedTerms) -> Tensor:
    """The same by the reference, site by site."""
    pages, pieces = terms.pages, []
    for nth, (offset, width) in enumerate(zip(pages.out_offsets, pages.out_widths, strict=True)):
        pieces.append(reference.lora_add(y[:, offset : offset + width], x, terms.segments(nth)))
    return torch.cat(pieces, 1) if torch.is_grad_enabled() and any(p.requires_grad for p in pieces) else y
