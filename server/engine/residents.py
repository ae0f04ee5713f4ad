"""The adapters that are in the pool, in the order of their use, and who needs each: requests, jobs, pins.

Nothing here moves memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from coserve.server.engine.page_tables import PagedSites


@dataclass(slots=True)
class Resident:
    sites: PagedSites
    units: tuple[int, ...]  # of the source, in which its pages lie
    pages: int  # of these units
    pinned: bool  # a training copy
    kept: bool = False  # pinned by its tenant
    in_flight: int = 0
    retired: bool = False  # goes with its last request
    arrival: torch.cuda.Event | None = None  # when its pages are written, on CUDA

    @property
    def idle(self) -> bool:
        return self.in_flight == 0 and not self.pinned and not self.kept

    @property
    def page_numbers(self) -> list[int]:
        """Of the pages that its tensors lie in."""
        return [page for a, b, _ in self.sites.values() for tensor in (a, b) for page in tensor.pages]


class Residents:
    """By key, least recently used first."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[str, Resident] = OrderedDict()
        self._reserved: tuple[str, ...] = ()
        self._idle_units: int | None = None  # as long as it is true

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> Resident:
        return self._by_key[key]

    def get(self, key: str) -> Resident | None:
        return self._by_key.get(key)

    @property
    def keys(self) -> list[str]:
        return list(self._by_key)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._by_key.values())

    def add(self, key: str, resident: Resident) -> None:
        self._by_key[key] = resident
        self._idle_units = None

    def pop(self, key: str) -> Resident:
        self._idle_units = None
        return self._by_key.pop(key)

    def used(self, key: str) -> None:
        """It is the one that was used last."""
        self._by_key.move_to_end(key)

    def changed(self, key: str) -> Resident:
        """To be called by who changes what a resident is needed for."""
        self._idle_units = None
        return self._by_key[key]

    def reserve(self, keys: Iterable[str]) -> None:
        """See `AdapterPool.reserve`."""
        self._reserved = tuple(keys)

    @property
    def idle(self) -> list[str]:
        """Those that nobody uses, in the order in which they go: reserved ones last, of these the most urgent last."""
        reserved = dict.fromkeys(self.reserved)
        loose = [key for key, resident in self._by_key.items() if resident.idle and key not in reserved]
        return [*loose, *reversed(reserved)]

    @property
    def reserved(self) -> list[str]:
        """Idle ones that are reserved."""
        return [key for key in self._reserved if key in self._by_key and self._by_key[key].idle]

    @property
    def idle_units(self) -> int:
        """Asked for in every iteration, so it is counted only when something has changed."""
        if self._idle_units is None:
            self._idle_units = sum(len(resident.units) for resident in self if resident.idle)
        return self._idle_units
