"""Adapters in a scattered, poisoned pool, and the same terms in float64 for the plain-torch oracle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.lora import LoraSegment, PageTable, RowRange, reference
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.page_source import OwnPages


@dataclass
class Pair:
    a: Tensor
    b: Tensor
    scaling: float


class PagedAdapters:
    """Adapters of given ranks at sites {name: (in, out)}, their pages interleaved and every foreign element NaN."""

    def __init__(
        self, ranks: Sequence[dict[str, int] | int], sites: dict[str, tuple[int, int]], dtype: torch.dtype,
        device: torch.device, *, page_elements: int, seed: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.sites, self.keys = sites, [str(n) for n in range(len(ranks))]
        self.pairs: list[dict[str, Pair]] = []
        for number, rank in enumerate(ranks):
            per_site = rank if isinstance(rank, dict) else dict.fromkeys(sites, rank)
            weights = {}
            for site, r in per_site.items():
                a = torch.randn(r, sites[site][0], generator=generator)
                b = torch.randn(r, sites[site][1], generator=generator)
                weights[site] = Pair(a.to(dtype), b.to(dtype), 0.25 + 0.5 * number)
            self.pairs.append(weights)
        elements = [t.numel() for w in self.pairs for p in w.values() for t in (p.a, p.b)]
        pages = sum(-(-n // page_elements) for n in elements)
        source = OwnPages(2 * pages + 2, page_elements, dtype, device)
        # Every other page is taken, so that no list of pages is consecutive.
        source.give(source.take([source.most_units]).units[::2])
        pool = AdapterPool(source)
        for key, weights in zip(self.keys, self.pairs, strict=True):
            pool.load(key, weights, pinned=True, fold_scaling=False)
        self.pool, self.page_elements = pool, page_elements
        self._poison(pool.page_table(self.keys, self.sites))

    def table(self) -> PageTable:
        return self.pool.page_table(self.keys, self.sites)

    def _poison(self, table: PageTable) -> None:
        foreign = torch.ones(table.flat.numel(), dtype=torch.bool)
        numbers = table.numbers.tolist()
        for widths, per_adapter in zip(table.widths, table.index.tolist(), strict=True):
            for rank, first_a, first_b, _ in per_adapter:
                for first, width in zip((first_a, first_b), widths, strict=True):
                    for e0 in range(0, rank * width, self.page_elements):
                        start = numbers[first + e0 // self.page_elements] * self.page_elements
                        foreign[start : start + min(self.page_elements, rank * width - e0)] = False
        table.flat[foreign.to(table.flat.device)] = torch.nan

    def oracle(
        self, y: Tensor, x: Tensor, ranges: Sequence[RowRange], wanted: Tensor | None = None, dropout: Sequence = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64 on the CPU: y, and the gradients of sum(y * wanted): dy, dx, then dA and dB of
        every site, the rank rows of all adapters stacked."""
        y, x = y.detach().cpu().double().requires_grad_(), x.detach().cpu().double().requires_grad_()
        widths = [out for _, out in self.sites.values()]
        leaves = [
            {s: (p.a.double().requires_grad_(), p.b.double().requires_grad_()) for s, p in weights.items()}
            for weights in self.pairs
        ]
        pieces = []
        for site, offset, width in zip(self.sites, itertools.accumulate([0, *widths[:-1]]), widths, strict=True):
            segments = [
                LoraSegment(r.start, r.end, *leaves[r.adapter][site], self.pairs[r.adapter][site].scaling,
                            dropout[n] if dropout else None)
                for n, r in enumerate(ranges) if site in self.pairs[r.adapter] and r.end > r.start
            ]  # fmt: skip
            pieces.append(reference.lora_add(y[:, offset : offset + width], x, segments))
        out = torch.cat(pieces, 1)
        if wanted is None:
            return out.detach(), []
        stacked = [[leaf[site][side] for leaf in leaves if site in leaf] for site in self.sites for side in (0, 1)]
        flat = [t for tensors in stacked for t in tensors]
        grads = torch.autograd.grad((out * wanted.cpu().double()).sum(), [y, x, *flat], allow_unused=True)
        found = iter(torch.zeros_like(t) if g is None else g for t, g in zip(flat, grads[2:], strict=True))
        return out.detach(), [
            *grads[:2],
            *(torch.cat([y.new_zeros(0), *(next(found) for _ in tensors)]) for tensors in stacked),
        ]
