"""Paged LoRA as a differentiable function over the Triton kernels. With h = x Aᵀ and g = dy Bᵀ:

    y += s h B,      dx = s g A,      dA = s gᵀ x,      dB = s hᵀ dy,      dy goes on to the frozen product.

h is kept from the forward (rank columns, float32); g is computed again. The forward runs in the family that
the terms name, the backward in the grouped one. Imports Triton: only for CUDA tensors, or under its interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coserve.kernels.lora.families import Family
from coserve.kernels.lora.grouped import expand, shrink, splits_for, weight_grad
from coserve.kernels.lora.pages import A, B, PagedTerms
from coserve.kernels.lora.per_row import expand_rows, shrink_all, splits_for_all
from coserve.kernels.lora.tiles import hidden_buffer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged_lora_add(y: Tensor, x: Tensor, terms: PagedTerms, *, in_place: bool = False) -> Tensor:
    """y [T, sum of out widths] + the terms of x [T, in]; rows of no range stay as they are.

    Differentiable in x, y and the terms' perturbations: a new tensor under autograd, without it y, changed in place.

    Args:
        in_place: y may be changed under autograd, too: nobody else needs its values.

    Raises:
        ValueError: dtypes differ or are not supported, or the widths are not those of the pages.
    """
    _check(y, x, terms)
    x = _with_unit_stride(_dropped(x, terms) if any(terms.dropout) else x)
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or terms.perturbations):
        return _PagedLora.apply(y, x, terms, in_place, *terms.perturbations)
    _add(y, x, terms)
    return y


class _PagedLora(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, x: Tensor, terms: PagedTerms, in_place: bool, *perturbations: Tensor
    ) -> Tensor:
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone()
        h = _add(y, x, terms)
        ctx.terms = terms
        ctx.save_for_backward(*((x, h) if any(p.requires_grad for p in perturbations) else ()))
        ctx.x_shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        terms: PagedTerms = ctx.terms
        routing, pages = terms.routing, terms.pages
        dx = dy.new_zeros(ctx.x_shape) if ctx.needs_input_grad[1] else None  # rows of no adapter stay zero
        leaves: list[Tensor | None] = [None] * len(terms.perturbations)
        if len(terms):
            rows = _with_unit_stride(dy)
            g = hidden_buffer(len(routing.rows), pages, splits_for(routing, pages, max(pages.out_widths)))
            shrink(g, rows, routing, pages, B)
            if dx is not None:
                expand(dx, g, routing, pages, A)
            if ctx.saved_tensors:
                x, h = ctx.saved_tensors
                leaves = _weight_gradients(terms, x, h, rows, g)
        return dy, dx, None, None, *leaves


def _add(y: Tensor, x: Tensor, terms: PagedTerms) -> Tensor:
    """Changes y; returns the hidden values [S, splits, N, R]."""
    routing, pages = terms.routing, terms.pages
    row_by_row = terms.family is Family.PER_ROW
    splits = splits_for_all(pages) if row_by_row else splits_for(routing, pages, pages.in_width)
    h = hidden_buffer(len(routing.rows), pages, splits)
    if len(terms) and row_by_row:
        shrink_all(h, x, routing, pages)
        expand_rows(y, h, routing, pages)
    elif len(terms):
        shrink(h, x, routing, pages, A)
        expand(y, h, routing, pages, B)
    return h


def _weight_gradients(terms: PagedTerms, x: Tensor, h: Tensor, dy: Tensor, g: Tensor) -> list[Tensor | None]:
    """dA, dB of every slice, stacked rank rows, in the order and dtype of the perturbations."""
    routing, pages = terms.routing, terms.pages
    found = []
    for nth, (offset, width) in enumerate(zip(pages.out_offsets, pages.out_widths, strict=True)):
        for hidden, right, column, columns in ((g, x, 0, pages.in_width), (h, dy, offset, width)):
            parts = x.new_empty(len(routing.chunks), pages.max_rank, columns, dtype=torch.float32)
            out = x.new_empty(sum(pages.ranks[nth]), columns, dtype=torch.float32)
            weight_grad(out, parts, hidden, right, column, routing, pages, nth)
            found.append(out)
    return [out.to(leaf.dtype) for out, leaf in zip(found, terms.perturbations, strict=True)]


def _dropped(x: Tensor, terms: PagedTerms) -> Tensor:
    """x with the ranges' dropout applied to their rows, differentiable."""
    pieces, row = [], 0
    for r, drop in zip(terms.routing.ranges, terms.dropout, strict=True):
        pieces.append(x[row : r.start])
        pieces.append(x[r.start : r.end] if drop is None else drop(x[r.start : r.end]))
        row = r.end
    return torch.cat([*pieces, x[row:]])


def _with_unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _check(y: Tensor, x: Tensor, terms: PagedTerms) -> None:
    pages = terms.pages
    if not (y.dtype == x.dtype == pages.flat.dtype) or x.dtype not in DTYPES:
        raise ValueError(
            f"y is {y.dtype}, x {x.dtype}, the pool {pages.flat.dtype}: the kernels take one dtype for all of them, "
            f"one of {', '.join(str(d) for d in DTYPES)}"
        )
    if len(terms) and (x.shape[1] != pages.in_width or y.shape[1] != sum(pages.out_widths)):
        raise ValueError(
            f"x has {x.shape[1]} columns and y {y.shape[1]}; the adapters' pairs are "
            f"{pages.in_width} wide on the input side and {sum(pages.out_widths)} on the output side"
        )
    if y.stride(1) != 1:
        raise ValueError(f"the rows of y are not contiguous (strides {y.stride()})")
