"""The adapters that are in the pool, in the order of their use, and who needs each: requests, jobs, pins.

Nothing here moves memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Set
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
        self._named: Set[str] = frozenset()
        self._spare: int | None = None  # `spare_units`, as long as it is true

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
        self._spare = None

    def pop(self, key: str) -> Resident:
        self._spare = None
        return self._by_key.pop(key)

    def used(self, key: str) -> None:
        """It is the one that was used last."""
        self._by_key.move_to_end(key)

    def changed(self, key: str) -> Resident:
        """To be called by who changes what a resident is needed for."""
        self._spare = None
        return self._by_key[key]

    def name(self, keys: Set[str]) -> None:
        """See `AdapterPool.name`."""
        if keys != self._named:
            self._named, self._spare = frozenset(keys), None

    @property
    def idle(self) -> list[str]:
        return [key for key, resident in self._by_key.items() if resident.idle]

    @property
    def spare(self) -> list[str]:
        """Idle ones that no request names."""
        return [key for key in self.idle if key not in self._named]

    @property
    def spare_units(self) -> int:
        """Of these. Asked for in every iteration, so it is counted only when something has changed."""
        if self._spare is None:
            self._spare = sum(len(self._by_key[key].units) for key in self.spare)
        return self._spare
