"""Random batches through the LoRA kernels, and how far they may be from the plain-torch reference in float64.

Imports Triton: for tests marked `gpu`.
"""

from __future__ import annotations

import torch
from kernel_device import poisoned_memory, relative_error

from coserve.kernels.lora import Family, PagedTerms, RowRange, route
from coserve.kernels.lora.function import paged_lora_add

# A sum that lacks one of N random terms is off by 1/sqrt(N): 0.06 for the longest sums here (256 ranks).
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def ranges_of(triples):
    return [RowRange(*triple) for triple in triples]


def batch(rows, inputs, outputs, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    x, y, wanted = (torch.randn(rows, n, generator=generator).to(dtype).to(device) for n in (inputs, outputs, outputs))
    return x, y * 0.1, wanted


def run(adapters, triples, x, y, wanted=None, *, dropout=(), sites=1, family=Family.GROUPED, **sizes):
    """(out, gradients in the oracle's order) through the kernels, with every fresh buffer poisoned."""
    with poisoned_memory():
        routing = route(ranges_of(triples), len(adapters.keys), device=x.device, **sizes)
        pages = adapters.table().at(0, sites)
        if wanted is None:
            with torch.no_grad():
                return paged_lora_add(y.clone(), x, PagedTerms(routing, pages, dropout, family=family)), []
        leaves = pages.perturbations()
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = paged_lora_add(y, x, PagedTerms(routing, pages, dropout, leaves, family))
        return out.detach(), list(torch.autograd.grad((out * wanted).sum(), [y, x, *leaves]))


def worst_range(got, want, ranges):
    """The largest relative error over the row ranges, each by itself; their terms are some 40 times as large as y."""
    return max(relative_error(got[r.start : r.end].cpu(), want[r.start : r.end]) for r in ranges if r.end > r.start)


def rows_without(ranges, rows):
    inside = {row for r in ranges for row in range(r.start, r.end)}
    return [row for row in range(rows) if row not in inside]
