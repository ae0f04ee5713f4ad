"""Where the pairs of a batch's adapters lie in the adapter pool, as tensors that a kernel can follow.

The pool is one flat tensor in pages of equal size. A tensor of rank rows [r, width] lies row-major over a list
of pages: element e = i * width + j is element e % page_elements of page numbers[first + e // page_elements].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coserve.kernels.lora.families import Family
from coserve.kernels.lora.routing import Routing

A, B = 1, 2  # columns of SitePages.index that say where the tensor's list of pages begins


@dataclass(frozen=True, slots=True)
class PageTable:
    """Some adapters at some sites. Valid while none of the adapters leaves the pool."""

    flat: Tensor  # [pages * page_elements], the pool itself
    page_elements: int
    numbers: Tensor  # int32 [n]: page lists, one behind another
    index: Tensor  # int32 [sites, adapters, 4]: rank (0: no term here), A's list, B's list, ranks of those before
    columns: Tensor  # int32 [sites, 2]: the sites' widths (in, out)
    scaling: Tensor  # float32 [sites, adapters]
    ranks: tuple[tuple[int, ...], ...]  # [sites][adapters], the host's copy
    widths: tuple[tuple[int, int], ...]  # (in, out) a site, the host's copy
    largest_rank: int
    _views: dict[tuple[int, int], SitePages] = field(default_factory=dict, repr=False, compare=False)

    def at(self, first: int, count: int = 1) -> SitePages:
        """Sites [first, first + count), which read one x; their outputs are neighbouring columns of one y.

        Views of this table: nothing is copied, and a second call gives the same object.
        """
        if (first, count) in self._views:
            return self._views[first, count]
        chosen = slice(first, first + count)
        inputs = {width for width, _ in self.widths[chosen]}
        if len(inputs) != 1:
            raise ValueError(f"sites {first} to {first + count - 1} read inputs of different widths {sorted(inputs)}")
        self._views[first, count] = SitePages(self, chosen)
        return self._views[first, count]


class SitePages:
    """The pages that one launch reads: one site, or several that share their input (q, k, v; gate, up)."""

    def __init__(self, table: PageTable, chosen: slice) -> None:
        self.flat, self.page_elements, self.numbers = table.flat, table.page_elements, table.numbers
        self.index, self.columns, self.scaling = table.index[chosen], table.columns[chosen], table.scaling[chosen]
        self.ranks = table.ranks[chosen]  # [S][adapters]
        self.slices = len(self.ranks)
        self.adapters = len(self.ranks[0])
        self.max_rank = max((rank for row in self.ranks for rank in row), default=0)
        self.in_width = table.widths[chosen][0][0]
        self.out_widths = tuple(out for _, out in table.widths[chosen])
        self.out_offsets = tuple(itertools.accumulate(self.out_widths, initial=0))[:-1]

    def pair(self, slice_number: int, adapter: int) -> tuple[Tensor, Tensor, float]:
        """(A [r, in], B [r, out], scaling), gathered from the pages; for plain torch on the host."""
        rank, first_a, first_b, _ = self.index[slice_number, adapter].tolist()
        a = self._gather(first_a, rank, self.in_width)
        return a, self._gather(first_b, rank, self.out_widths[slice_number]), float(self.scaling[slice_number, adapter])

    def _gather(self, first: int, rank: int, width: int) -> Tensor:
        count = -(-rank * width // self.page_elements)
        pages = self.flat.view(-1, self.page_elements).index_select(0, self.numbers[first : first + count])
        return pages.view(-1)[: rank * width].view(rank, width)

    def perturbations(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Leaves that gradients are taken at: zeros added to A and B, for every slice first A's then B's.

        Each stacks the rank rows of all adapters, [sum of ranks, in] and [sum of ranks, out]. The gradient
        against one is the gradient against the pages' values, in `dtype` rather than the pool's. No memory
        stands behind them.
        """
        leaves = []
        for row, out in zip(self.ranks, self.out_widths, strict=True):
            for width in (self.in_width, out):
                zero = torch.zeros((), dtype=dtype, device=self.flat.device)
                leaves.append(zero.expand(sum(row), width).requires_grad_())
        return tuple(leaves)


@dataclass(frozen=True, slots=True)
class PagedTerms:
    """The adapters' terms of one batch at one launch's sites: what a list of `LoraSegment` is to the reference."""

    routing: Routing
    pages: SitePages
    dropout: Sequence[Callable[[Tensor], Tensor] | None] = ()  # one a range of the routing, or empty
    perturbations: tuple[Tensor, ...] = ()  # see SitePages.perturbations; empty: no gradient to A and B
    family: Family = Family.GROUPED  # of the forward's launches

    def __post_init__(self) -> None:
        if self.routing.adapters != self.pages.adapters:
            raise ValueError(f"routing knows {self.routing.adapters} adapters, the pages {self.pages.adapters}")
        if self.dropout and len(self.dropout) != len(self.routing.ranges):
            raise ValueError(f"{len(self.dropout)} dropouts for {len(self.routing.ranges)} row ranges")
        if self.perturbations and len(self.perturbations) != 2 * self.pages.slices:
            raise ValueError(f"{len(self.perturbations)} perturbations for {self.pages.slices} pairs")
        if any(self.dropout) and self.pages.slices > 1:
            raise ValueError("dropout differs from site to site: launch the sites one by one")

    def __len__(self) -> int:
        """Rows with an adapter; 0 where there is nothing to add."""
        return len(self.routing.rows) if self.pages.max_rank else 0
