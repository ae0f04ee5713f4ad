"""Page tables of the adapters of a batch, put together from one part an adapter, and kept while a batch repeats.

A batch of 128 adapters at the 224 sites of an 8B model has 28,672 entries: an adapter's part is worked out once, when
it is first asked for, and a table is its parts side by side.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.lora import PageTable
from coserve.kernels.transfer import integers, to_device

_KEPT_TABLES = 16  # of a decoding batch one is in use; arrivals and training bring others


@dataclass(frozen=True)
class PagedTensor:
    """A tensor of rank rows [rows, width] in the pool. Kernels follow `pages`; the rest is for who reads without."""

    rows: int
    width: int
    pages: tuple[int, ...]
    flat: Tensor = field(repr=False, compare=False)  # the pool
    page_elements: int

    @cached_property
    def consecutive(self) -> bool:
        return all(after - before == 1 for before, after in itertools.pairwise(self.pages))

    @cached_property
    def where(self) -> Tensor:
        """View [rows, width] of the pool where the pages are consecutive, else int64 page numbers on its device."""
        if not self.consecutive:
            return integers(self.pages, self.flat.device, torch.int64)
        start = self.pages[0] * self.page_elements if self.pages else 0
        return self.flat[start : start + self.rows * self.width].view(self.rows, self.width)


PagedSites = dict[str, tuple[PagedTensor, PagedTensor, float]]  # site name -> A, B, scaling


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter at the sites of a table."""

    owner: PagedSites  # held, so that no other adapter can have its identity
    index: np.ndarray  # int32 [sites, 3]: rank, where A's and B's lists begin in `numbers`
    numbers: np.ndarray  # int32 [n]
    scaling: np.ndarray  # float32 [sites]


class PageTables:
    """Of one pool. An adapter that leaves the pool and comes back is another `PagedSites` object."""

    def __init__(self, flat: Tensor, page_elements: int) -> None:
        self._flat, self._page_elements = flat, page_elements
        self._parts: OrderedDict[tuple[int, tuple[str, ...]], _Part] = OrderedDict()
        self._tables: OrderedDict[tuple[object, ...], tuple[list[PagedSites], PageTable]] = OrderedDict()

    def table(self, adapters: Mapping[str, PagedSites], sites: Mapping[str, tuple[int, int]]) -> PageTable:
        """See `AdapterPool.page_table`."""
        key = (tuple(id(paged) for paged in adapters.values()), tuple(sites.items()))
        if key not in self._tables:
            self._tables[key] = (list(adapters.values()), self._build(adapters, sites))
            if len(self._tables) > _KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key][1]

    def forget(self, paged: PagedSites) -> None:
        """An adapter has left the pool."""
        for part_key in [k for k, part in self._parts.items() if part.owner is paged]:
            del self._parts[part_key]
        for key in [k for k, (owners, _) in self._tables.items() if any(o is paged for o in owners)]:
            del self._tables[key]

    def _build(self, adapters: Mapping[str, PagedSites], sites: Mapping[str, tuple[int, int]]) -> PageTable:
        names = tuple(sites)
        parts = []
        for key, paged in adapters.items():
            self._check(key, paged, sites)
            parts.append(self._part(paged, names))
        index = np.zeros((len(names), len(parts), 4), dtype=np.int32)
        first = 0
        for number, part in enumerate(parts):
            index[:, number, :3] = part.index
            index[:, number, 1:3] += first
            first += len(part.numbers)
        index[:, :, 3] = index[:, :, 0].cumsum(1) - index[:, :, 0]
        columns = np.array(list(sites.values()), dtype=np.int32).reshape(-1, 2)
        numbers = np.concatenate([np.zeros(0, np.int32), *(part.numbers for part in parts)])
        scaling = np.stack([part.scaling for part in parts], 1) if parts else np.zeros((len(names), 0), np.float32)
        device = self._flat.device
        packed = to_device(torch.from_numpy(np.concatenate([index.ravel(), columns.ravel(), numbers])), device)
        on_device = packed.split([index.size, columns.size, len(numbers)])
        return PageTable(
            flat=self._flat,
            page_elements=self._page_elements,
            numbers=on_device[2],
            index=on_device[0].view(index.shape),
            columns=on_device[1].view(columns.shape),
            scaling=to_device(torch.from_numpy(np.ascontiguousarray(scaling)), device),
            ranks=tuple(tuple(row) for row in index[:, :, 0].tolist()),
            widths=tuple(sites.values()),
            largest_rank=int(index[:, :, 0].max(initial=0)),
        )

    def _part(self, paged: PagedSites, names: tuple[str, ...]) -> _Part:
        key = (id(paged), names)
        if key not in self._parts:
            index = np.zeros((len(names), 3), dtype=np.int32)
            scaling = np.zeros(len(names), dtype=np.float32)
            numbers: list[int] = []
            for nth, name in enumerate(names):
                index[nth, 1:] = len(numbers)
                if name in paged:
                    a, b, scaling[nth] = paged[name]
                    index[nth] = (a.rows, len(numbers), len(numbers) + len(a.pages))
                    numbers += (*a.pages, *b.pages)
            self._parts[key] = _Part(paged, index, np.array(numbers, dtype=np.int32), scaling)
        return self._parts[key]

    @staticmethod
    def _check(key: str, paged: PagedSites, sites: Mapping[str, tuple[int, int]]) -> None:
        for name, (a, b, _) in paged.items():
            if name in sites and (a.width, b.width) != sites[name]:
                raise ValueError(f"{name} is {sites[name]} wide (in, out), the pair of {key} {(a.width, b.width)}")
