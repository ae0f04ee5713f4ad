"""Low-rank adapters on the device, and who is resident: copied in, kept while in use, evicted when idle.

Every LoRA tensor, A as rank rows [r, in] and B as rank rows [r, out], lies row-major over its own list of
pages; element (i, j) is element (i * width + j) % page_elements of page number (i * width + j) // page_elements
of the list. One page size for all widths means that no shape fragments the pool, and a rank costs its own
rows only. Where the pages come from is the source's affair (`page_source`): in an engine they are blocks of the K/V
cache, and adapters that nobody uses give way when sequences want them. The pool never reads a disk and never
waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from coserve.kernels.lora import PageTable
from coserve.server.engine.adapter_pages import AdapterPages
from coserve.server.engine.host_image import HostImage, Weights, folded
from coserve.server.engine.page_source import OwnPages, PageSource
from coserve.server.engine.page_tables import PageTables
from coserve.server.engine.pool_room import PoolRoom
from coserve.server.engine.residents import Resident, Residents


class PoolFull(RuntimeError):
    """The adapter does not fit now. `pages_available` counts what is free or could be evicted at once."""

    def __init__(self, pages_wanted: int, pages_available: int, page_bytes: int) -> None:
        super().__init__(
            f"the adapter wants {pages_wanted} pages of {page_bytes} bytes, {pages_available} would fit now; "
            "wait for adapters in use, or raise --adapter-memory"
        )
        self.pages_wanted = pages_wanted
        self.pages_available = pages_available


class AdapterInUse(RuntimeError):
    """An adapter with requests in flight, or pinned by a training job, cannot be unloaded."""


class AdapterPool:
    """Serving copies under their version digest, training copies under a key of their job.

    A serving copy has its scaling folded into B when it is loaded (one product a load instead of one a
    token), so its `scaling` reads 1. A training copy keeps A and B as the optimizer knows them: pass
    `fold_scaling=False`.
    """

    def __init__(self, source: PageSource) -> None:
        self.page_elements = source.page_elements
        self.dtype = source.flat.dtype
        self.page_bytes = self.page_elements * self.dtype.itemsize
        self._pages = AdapterPages(source)
        self._tables = PageTables(self._pages.flat, self.page_elements)
        self._residents = Residents()
        self.room = PoolRoom(source, self._residents)

    @staticmethod
    def of(num_bytes: int, page_elements: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> AdapterPool:
        """A pool in memory of its own, outside of an engine: `num_bytes`, rounded down to whole pages."""
        return AdapterPool(OwnPages(num_bytes // (page_elements * dtype.itemsize), page_elements, dtype, device))

    @property
    def flat(self) -> Tensor:
        """[elements], the memory that pages number: to be read."""
        return self._pages.flat

    @property
    def device(self) -> torch.device:
        return self._pages.flat.device

    @property
    def bytes_used(self) -> int:
        return self.room.used * self.page_bytes

    def pages_wanted(self, weights: Weights) -> int:
        """Of the units that an adapter takes."""
        return self.room.rounded(sum(map(self._pages.wanted, _tensors(weights))))

    def pages_of(self, key: str) -> int:
        """Pages that a resident adapter holds."""
        return self._residents[key].pages

    def __contains__(self, key: str) -> bool:
        return key in self._residents

    def resident(self) -> list[str]:
        """Keys, least recently used first."""
        return self._residents.keys

    def load(self, key: str, weights: Weights, *, pinned: bool = False, fold_scaling: bool = True) -> None:
        """Copy an adapter in, evicting idle ones as needed, least recently used first.

        Loading a key that is resident does nothing: a version is immutable. All or nothing.

        Raises:
            PoolFull: it does not fit beside what is in use; nothing was evicted.
            ValueError: a tensor is not [r, width], or A and B of a site differ in rank.
        """
        if key in self._residents:
            self._residents.used(key)
            return
        for site, pair in weights.items():
            if pair.a.dim() != 2 or pair.b.dim() != 2 or pair.a.shape[0] != pair.b.shape[0]:
                raise ValueError(f"{site}: A {list(pair.a.shape)} and B {list(pair.b.shape)} are not [r, in], [r, out]")
        wanted = self.pages_wanted(weights)
        if wanted > self.room.available:
            raise PoolFull(wanted, self.room.available, self.page_bytes)
        fold = fold_scaling and not isinstance(weights, HostImage)  # an image's is folded already
        values = {name: folded(pair) if fold else (pair.a, pair.b, pair.scaling) for name, pair in weights.items()}
        self._evict_until(wanted)
        stored, units = self._pages.take(_tensors(weights))
        pairs = zip(values, stored[::2], stored[1::2], strict=True)
        sites = {site: (a, b, values[site][2]) for site, a, b in pairs}
        resident = Resident(sites, units, wanted, pinned)
        self._residents.add(key, resident)
        try:
            if isinstance(weights, HostImage):
                resident.arrival = self._pages.write_image(resident.page_numbers, weights)
                return
            for site, (a, b, _) in values.items():
                self._pages.write(sites[site][0], a)
                self._pages.write(sites[site][1], b)
        except Exception:
            self._drop(key)  # memory ran out: its pages go back
            raise

    def image_of(self, weights: Weights) -> Weights:
        """The same, laid out for one copy that nobody waits for; as they are where device and host are one. May be
        called from any thread."""
        if self.device.type != "cuda":
            return weights
        return HostImage(weights, self.page_elements, self.dtype, pinned=True)

    # ------------------------------------------------------------------ for others who want the memory

    def reserve(self, keys: Iterable[str]) -> None:
        """No load evicts these, for requests wait for them; the first ones are the most urgent. If sequences want their
        memory and nobody uses them they go, after all others."""
        self._residents.reserve(keys)

    @property
    def spare_blocks(self) -> int:
        """Units of adapters that nobody uses."""
        return self._residents.idle_units

    def give_way(self, blocks: int) -> None:
        """Evict such adapters until so many units are given back."""
        for key in self._residents.idle:
            if blocks <= 0:
                return
            blocks -= len(self._residents[key].units)
            self._drop(key)

    def blocks_of(self, key: str) -> int:
        """Units that a resident adapter has while it is used, and that count as free while it is not."""
        return 0 if self._residents[key].kept else len(self._residents[key].units)

    # ------------------------------------------------------------------ who uses them

    def ready(self, key: str) -> bool:
        """Whether an adapter is resident and its pages are written. Never waits."""
        resident = self._residents.get(key)
        return resident is not None and (resident.arrival is None or resident.arrival.query())

    @property
    def arriving(self) -> bool:
        """Whether some resident adapter's pages are still being written."""
        return any(r.arrival is not None and not r.arrival.query() for r in self._residents)

    def acquire(self, key: str) -> None:
        """One more request uses a resident adapter."""
        self._residents.changed(key).in_flight += 1
        self._residents.used(key)

    def release(self, key: str) -> None:
        """One request fewer; a retired adapter goes with its last."""
        resident = self._residents[key]
        if resident.in_flight < 1:
            raise ValueError(f"adapter {key} was released more often than acquired")
        self._residents.changed(key).in_flight -= 1
        self._drop_if_over(key)

    def in_flight(self, key: str) -> int:
        return self._residents[key].in_flight if key in self._residents else 0

    def pin(self, key: str) -> None:
        self._residents.changed(key).pinned = True

    def unpin(self, key: str) -> None:
        self._residents.changed(key).pinned = False
        self._drop_if_over(key)

    def keep(self, key: str) -> None:
        """A resident adapter is not evicted any more, used or not."""
        self._residents.changed(key).kept = True

    def let_go(self, key: str) -> None:
        """It may be evicted again."""
        self._residents.changed(key).kept = False
        self._drop_if_over(key)

    def unload(self, key: str) -> None:
        """Give an adapter's pages back now; an unknown key is no error.

        Raises:
            AdapterInUse: it has requests in flight or is pinned.
        """
        resident = self._residents.get(key)
        if resident is None:
            return
        if not resident.idle:
            reason = "pinned" if resident.pinned or resident.kept else f"used by {resident.in_flight} requests"
            raise AdapterInUse(f"adapter {key} is {reason}")
        self._drop(key)

    def retire(self, key: str) -> bool:
        """Unload now or, if it is in use, with its last request. True when it is gone already."""
        resident = self._residents.get(key)
        if resident is None:
            return True
        if resident.idle:
            self._drop(key)
            return True
        resident.retired = True
        return False

    def tensors(self, key: str, site: str) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, in], B [r, out], scaling) of a resident adapter, None where it has nothing at this site.

        Views of the pool where the pages are consecutive, else gathered copies: read them, never write.
        """
        entry = self._residents[key].sites.get(site)
        if entry is None:
            return None
        a, b, scaling = entry
        return self._pages.read(a), self._pages.read(b), scaling

    def rank(self, key: str, site: str) -> int:
        entry = self._residents[key].sites.get(site)
        return entry[0].rows if entry else 0

    def sites(self, key: str) -> list[str]:
        return list(self._residents[key].sites)

    def page_table(self, keys: Sequence[str], sites: Mapping[str, tuple[int, int]]) -> PageTable:
        """Where resident adapters `keys` lie at `sites`, for kernels that read the pages in place.

        Adapter number i of the table is keys[i]; an adapter without a term at a site has rank 0 there. Valid
        while they all stay: hold them in flight or pinned.

        Args:
            sites: name -> (in, out) of the linear layer, in the table's order.

        Raises:
            ValueError: an adapter's pair does not have a site's widths.
        """
        return self._tables.table({key: self._residents[key].sites for key in keys}, sites)

    def overwrite(self, key: str, site: str, a: Tensor, b: Tensor) -> None:
        """New values for a training copy, of the shapes it was loaded with."""
        stored_a, stored_b, _ = self._residents[key].sites[site]
        for name, stored, new in (("A", stored_a, a), ("B", stored_b, b)):
            if tuple(new.shape) != (stored.rows, stored.width):
                raise ValueError(f"{site}: {name} is {[stored.rows, stored.width]} in the pool, got {list(new.shape)}")
        self._pages.write(stored_a, a)
        self._pages.write(stored_b, b)

    def check(self) -> None:
        """Raise RuntimeError unless every page is accounted for."""
        self._pages.check(
            [t.pages for r in self._residents for a, b, _ in r.sites.values() for t in (a, b)],
            [r.units for r in self._residents],
        )

    def _evict_until(self, pages: int) -> None:
        reserved = set(self._residents.reserved)
        for key in self._residents.idle:
            if self.room.free >= pages or key in reserved:
                return
            self._drop(key)

    def _drop_if_over(self, key: str) -> None:
        resident = self._residents[key]
        if resident.retired and resident.idle:
            self._drop(key)

    def _drop(self, key: str) -> None:
        resident = self._residents.pop(key)
        self._tables.forget(resident.sites)
        self._pages.give_back(resident.page_numbers, resident.units, resident.arrival)


def default_page_elements(hidden_size: int) -> int:
    """A page holds 8 rank rows of the model's hidden size."""
    return 8 * hidden_size


def _tensors(weights: Weights) -> list[Tensor]:
    """A and B of each site."""
    return [t for pair in weights.values() for t in (pair.a, pair.b)]
