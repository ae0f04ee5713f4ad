"""Reads adapter folders beside the iterations: a request is queued, a thread reads it, a later poll brings it.

Parsed adapters stay in a host-side cache under a byte cap, so that one evicted from the device comes back
without its disk. Nothing here touches the device, and neither `request` nor `poll` ever waits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from coserve.server.engine.cores import work_alone
from coserve.server.engine.host_image import Weights, weights_bytes


class AdapterLoader:
    """One reading thread. All methods are for one caller, the iteration loop."""

    def __init__(self, read: Callable[[Path], Weights], cache_bytes: int) -> None:
        """
        Args:
            read: parses a folder; whatever it raises is delivered in the adapter's place.
            cache_bytes: how much the host-side cache may hold.
        """
        self._read = read
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[str, Weights] = OrderedDict()  # least recently used first
        self._under_way: set[str] = set()
        self._ready: list[tuple[str, Weights | Exception]] = []
        self._orders: SimpleQueue[tuple[str, Path] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[str, Weights | Exception]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    @property
    def busy(self) -> bool:
        """Whether anything was requested and not yet delivered by `poll`."""
        return bool(self._under_way)

    def pending(self, digest: str) -> bool:
        """Whether this adapter was requested and not yet delivered by `poll`."""
        return digest in self._under_way

    def request(self, digest: str, path: Path) -> None:
        """Ask for a version; asking again before it was delivered does nothing."""
        if digest in self._under_way:
            return
        self._under_way.add(digest)
        cached = self._cache.get(digest)
        if cached is None:
            self._orders.put((digest, path))
        else:
            self._cache.move_to_end(digest)
            self._ready.append((digest, cached))

    def poll(self) -> list[tuple[str, Weights | Exception]]:
        """What has arrived since the last poll: (digest, weights, or what went wrong)."""
        delivered, self._ready = self._ready, []
        while not self._results.empty():
            digest, result = self._results.get()
            if not isinstance(result, Exception):
                self._keep(digest, result)
            delivered.append((digest, result))
        for digest, _ in delivered:
            self._under_way.discard(digest)
        return delivered

    def forget(self, digest: str) -> None:
        """Drop a deleted version from the cache."""
        weights = self._cache.pop(digest, None)
        if weights is not None:
            self._cached_bytes -= weights_bytes(weights)

    def close(self, timeout: float = 5.0) -> None:
        """End the thread after the read it is in."""
        self._orders.put(None)
        self._thread.join(timeout)

    def _keep(self, digest: str, weights: Weights) -> None:
        size = weights_bytes(weights)
        if size > self._cache_bytes:
            return
        self._cache[digest] = weights
        self._cached_bytes += size
        while self._cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= weights_bytes(oldest)

    def _run(self) -> None:
        work_alone()
        while (order := self._orders.get()) is not None:
            digest, path = order
            try:
                result: Weights | Exception = self._read(path)
            except Exception as error:  # noqa: BLE001 - a folder of any kind of damage must not end the thread
                result = error
            self._results.put((digest, result))
