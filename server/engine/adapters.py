"""Which adapter versions are in the pool, on their way to it, or wanted: residency over pool and loader.

Generation requests name a version by digest; the book keeps the versions of the oldest requests resident as far as
the pool's bytes allow, and never evicts one that a running request or a job is using. A version that is on
disk is loaded beside the iterations; its requests wait, they do not fail.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pages import pages_at_rank
from coserve.server.engine.adapter_pool import AdapterPool, Weights
from coserve.server.engine.containment import attempt
from coserve.server.engine.pins import Pins
from coserve.server.engine.pooled_adapter import PooledAdapter
from coserve.server.training.fault import Fault, fault_of
from coserve.server.training.peft.folder import AdapterError, AdapterUnreadable
from coserve.server.wire.messages import AdapterRef

log = logging.getLogger("coserve.engine")


class AdapterBook:
    """Adapters of generation requests, by digest."""

    def __init__(self, pool: AdapterPool, loader: AdapterLoader, data_dir: Path) -> None:
        self.pool, self._loader, self._data_dir = pool, loader, data_dir
        self._resident: dict[str, PooledAdapter] = {}  # one object a version: its neighbouring rows share a product
        self._arrived: dict[str, Weights] = {}  # read from disk, waiting for room
        self._placed = False  # whether the last tick put a version into the pool
        self._kept_out: str | None = None  # the first that has arrived and waits for what others in use hold
        self.lacks = 0  # blocks that it, or a pinned one, waits for (`PoolRoom.lacks`)
        self.pins = Pins(pool)

    def close(self) -> None:
        """End the loads; called once, when the engine drains."""
        self._loader.close()

    @property
    def moving(self) -> bool:
        """Whether a version is on its way, or has just come: who waits for it should ask again soon."""
        return self._placed or self._loader.busy or self.pool.arriving

    def ready(self, ref: AdapterRef | None) -> bool:
        """Whether its rows may run now."""
        return ref is None or self.pool.ready(ref.digest)

    def pages(self, ref: AdapterRef | None) -> int:
        """Pages of the pool that a resident version holds; 0 where nothing is known of it yet."""
        return self.pool.pages_of(ref.digest) if ref is not None and ref.digest in self.pool else 0

    def blocks(self, ref: AdapterRef | None) -> int:
        """Blocks that a resident version takes while a running request uses it, and that count as free otherwise."""
        return self.pool.blocks_of(ref.digest) if ref is not None and ref.digest in self.pool else 0

    def freed_by(self, leaving: Iterable[AdapterRef]) -> int:
        """Blocks that will count as free when requests with these versions, which run, are gone."""
        users = Counter(ref.digest for ref in leaving)
        return sum(self.pool.blocks_of(digest) for digest, n in users.items() if self.pool.in_flight(digest) == n)

    def kept_out(self, ref: AdapterRef | None) -> bool:
        """Whether it has been read, and has no room only as long as requests of others run."""
        return ref is not None and ref.digest == self._kept_out

    def handle(self, ref: AdapterRef) -> PooledAdapter:
        if ref.digest not in self._resident:
            self._resident[ref.digest] = PooledAdapter(self.pool, ref.digest)
        return self._resident[ref.digest]

    def acquire(self, ref: AdapterRef) -> None:
        self.pool.acquire(ref.digest)

    def release(self, ref: AdapterRef) -> None:
        self.pool.release(ref.digest)

    def drop(self, digest: str) -> None:
        """Forget a deleted version that nothing uses."""
        self.pool.retire(digest)  # a pinned one, when it is no longer pinned
        self._loader.forget(digest)
        self._resident.pop(digest, None)
        self._arrived.pop(digest, None)

    def capacity(self, wanted: Iterable[str] = ()) -> int:
        """How many distinct versions the pool can certainly hold at once, if `wanted` are those that requests name.

        What is resident tells their sizes. Pinned ones that nobody wants take their room from the others.
        """
        held, kept = self.pins.held, self.pool.room.kept
        resident = max(1, len(self.pool.resident()) - len(held))
        used = self.pool.room.used - kept
        others = resident if not used else max(1, (self.pool.room.whole - kept) * resident // used)
        return others + (len(held.intersection(wanted)) if held else 0)

    def tick(self, wanted: Iterable[AdapterRef]) -> dict[str, Fault]:
        """Move loads along for the versions in `wanted`, oldest request first.

        Returns the versions that cannot be served, by digest.
        """
        failed: dict[str, Fault] = {}
        self._placed = False
        for digest, result in self._loader.poll():
            if isinstance(result, Exception):
                failed[digest] = _load_fault(digest, result)
            else:
                self._arrived[digest] = result
        self._kept_out, self.lacks = None, 0
        self._bring_pins(failed)
        order: dict[str, AdapterRef] = {ref.digest: ref for ref in wanted}
        keep: list[str] = []  # for which no version behind them is to take the place
        for digest, ref in order.items():
            if digest in failed:
                continue
            if digest not in self.pool:
                image = self._arrived.get(digest)
                if image is None:
                    self._loader.request(digest, self._data_dir / ref.path)
                    continue
                fault = self._never_fits(image)
                if fault is not None:
                    failed[digest] = fault
                    del self._arrived[digest]
                    continue
                self.pool.reserve(keep)
                pages = self.pool.pages_wanted(image)
                if pages > self.pool.room.available:
                    if pages <= self.pool.room.whole - self.pool.room.held:
                        self._kept_out = digest
                        self.lacks = max(self.lacks, self.pool.room.lacks(pages))
                    break  # the versions ahead of it in line come first
                del self._arrived[digest]
                fault = attempt(f"loading adapter {digest[:12]}", partial(self.pool.load, digest, image))
                if fault is not None:
                    failed[digest] = fault
                    continue
                self._placed = True
            keep.append(digest)
        self.pool.reserve(keep)
        coming = order.keys() | {ref.digest for ref in self.pins.missing()}
        for digest in [d for d in self._arrived if d not in coming]:
            del self._arrived[digest]
        return failed

    def _bring_pins(self, failed: dict[str, Fault]) -> None:
        """Move pinned versions into the pool; what they would evict is idle."""
        for ref in self.pins.missing():
            digest, image = ref.digest, self._arrived.get(ref.digest)
            if digest in failed:
                self.pins.refuse(digest, failed[digest].message)
                continue
            if digest not in self.pool:
                if image is None:
                    self._loader.request(digest, self._data_dir / ref.path)
                    continue
                pages = self.pool.pages_wanted(image)
                if self.pins.has_room(pages):
                    if pages > self.pool.room.available:
                        self.lacks = max(self.lacks, self.pool.room.lacks(pages))
                        continue  # until those who hold the memory are through
                    fault = attempt(f"loading adapter {digest[:12]}", partial(self.pool.load, digest, image))
                    if fault is not None:
                        self.pins.refuse(digest, fault.message)
                        continue
                else:
                    self.pins.refuse(digest)
                    continue
            self.pins.hold(digest)

    def _never_fits(self, image: Weights) -> Fault | None:
        """Why an adapter cannot become resident, however long its requests wait."""
        problem = too_large(image, self.pool)
        if problem is not None:
            return Fault("adapter_invalid", f"the adapter cannot be loaded: {problem}")
        if self.pool.pages_wanted(image) > self.pool.room.whole - self.pool.room.kept:
            return Fault("adapter_unavailable", "pinned adapters leave too little adapter memory for this one")
        return None


def _load_fault(digest: str, error: Exception) -> Fault:
    """Whose fault it is: the adapter's (it will never do), the disk's (it may pass), or the server's."""
    log.warning("adapter %s could not be read: %s", digest[:12], error)
    if isinstance(error, (AdapterUnreadable, OSError)):
        return Fault("adapter_unavailable", "the adapter's files could not be read")
    if isinstance(error, AdapterError):
        return Fault("adapter_invalid", f"the adapter cannot be loaded: {error}")
    return fault_of(error)


def too_large(weights: Weights, pool: AdapterPool) -> str | None:
    """Why an adapter can never be resident, or None if it can."""
    pages = pool.pages_wanted(weights)
    if pages <= pool.room.whole:
        return None
    rank = _largest_rank(weights, pool)
    smaller = f"use rank {rank}, the largest that fits at the same modules" if rank else "no rank fits at these modules"
    return (
        f"the adapter needs {pages * pool.page_bytes} bytes of adapter memory and the server has "
        f"{pool.room.whole * pool.page_bytes}; {smaller}, or start the server with a larger --adapter-memory"
    )


def _largest_rank(weights: Weights, pool: AdapterPool) -> int:
    """Of an adapter with one rank at all modules that this one, which is too large, has; 0 if none would fit."""
    widths = [(pair.a.shape[1], pair.b.shape[1]) for pair in weights.values()]

    def pages(rank: int) -> int:
        return sum(pages_at_rank(rank, *both, pool.page_elements) for both in widths)

    highest = max(pair.a.shape[0] for pair in weights.values())
    return bisect_right(range(1, highest + 1), pool.room.whole, key=pages)
