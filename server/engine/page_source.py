"""Where the adapter pool's pages come from: memory of its own, or blocks of the K/V cache.

A page is `page_elements` consecutive elements of `flat`. Pages are taken in *units* that are given back as a whole: a
page where the memory is the pool's own; in the K/V cache a block, which is as many pages as fit its keys and values of
all layers, so that adapters, sequences and activations share one memory. What a page holds when it is taken is not
said, and nothing here reads or writes one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coserve.server.engine.kv_cache import BlockAllocator, KVCache
from coserve.server.engine.prefix_cache import BlockManager


@dataclass(frozen=True, slots=True)
class Grant:
    """What one adapter was given."""

    pages: tuple[tuple[int, ...], ...]  # of each of its tensors
    units: tuple[int, ...]


class PageSource(Protocol):
    page_elements: int
    unit_pages: int
    most_units: int  # that may be taken together

    @property
    def flat(self) -> Tensor:
        """The memory that pages number, as [elements]."""

    @property
    def free_units(self) -> int:
        """That could be taken now, if `most_units` allows it."""

    def take(self, counts: Sequence[int]) -> Grant:
        """Pages for tensors of so many pages each, in as few units as hold them. Raises OutOfBlocks."""

    def give(self, units: Iterable[int]) -> None:
        """Give back what `take` gave."""

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise RuntimeError unless `held` are the units that were taken, as far as that can be told from here."""


class OwnPages:
    """Memory that is the pool's alone."""

    unit_pages = 1

    def __init__(self, num_pages: int, page_elements: int, dtype: torch.dtype, device: torch.device | str) -> None:
        if num_pages < 1:
            raise ValueError("a pool of adapters needs at least one page")
        self.page_elements, self.most_units = page_elements, num_pages
        self.flat = torch.zeros(num_pages * page_elements, dtype=dtype, device=device)
        self._allocator = BlockAllocator(num_pages)

    @property
    def free_units(self) -> int:
        return self._allocator.free_blocks

    def take(self, counts: Sequence[int]) -> Grant:
        pages = tuple(tuple(self._allocator.allocate(count)) for count in counts)
        return Grant(pages, tuple(itertools.chain.from_iterable(pages)))

    def give(self, units: Iterable[int]) -> None:
        for page in units:
            self._allocator.free(page)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        self._allocator.check(held)


class BlockPages:
    """Blocks of a K/V cache, at most `most_blocks` of them, taken from its end where there is a choice."""

    def __init__(self, cache: KVCache, manager: BlockManager, most_blocks: int, page_elements: int) -> None:
        """`page_elements`: at the most; pages are as large as divides both that and every block's keys and values."""
        self.page_elements = cache.page_elements(page_elements)
        self.unit_pages = cache.block_bytes // cache.dtype.itemsize // self.page_elements
        self.most_units = most_blocks
        self._cache, self._manager = cache, manager
        # Not a view of the cache: what is written to its other blocks between a forward and its backward is no change
        # of the adapters that autograd has kept.
        self.flat = cache.flat.data

    @property
    def free_units(self) -> int:
        return self._manager.unheld_blocks

    def take(self, counts: Sequence[int]) -> Grant:
        blocks = self._manager.take(-(-sum(counts) // self.unit_pages), last=True)
        return Grant(laid_out(counts, self._cache.page_runs(blocks, self.page_elements)), tuple(blocks))

    def give(self, units: Iterable[int]) -> None:
        self._manager.give(units)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        blocks = [block for units in held for block in units]
        if len(set(blocks)) < len(blocks) or len(blocks) > self.most_units:
            raise RuntimeError(f"adapters hold {len(blocks)} blocks, {len(set(blocks))} of them different")


def laid_out(counts: Sequence[int], runs: Iterable[range]) -> tuple[tuple[int, ...], ...]:
    """Page numbers for tensors of so many pages each: large ones first, in the first run of consecutive pages with
    room; what fits nowhere as a whole gets what is left over, in pieces. `runs` hold them all."""
    left = list(runs)
    placed: dict[int, tuple[int, ...]] = {}
    for tensor in sorted(range(len(counts)), key=lambda i: -counts[i]):
        count = counts[tensor]
        at = next((i for i, run in enumerate(left) if len(run) >= count), None)
        if at is not None:
            placed[tensor], left[at] = tuple(left[at][:count]), left[at][count:]
    rest = itertools.chain.from_iterable(left)
    return tuple(placed[i] if i in placed else tuple(itertools.islice(rest, count)) for i, count in enumerate(counts))
