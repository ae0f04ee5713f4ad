"""Which versions stay in the adapter pool whether or not a request uses them.

The gateway says which they should be, all at once; those that come first have precedence. Pins hold at most half of the
pool, so that adapters that come and go, and training copies, always find room.
"""

from __future__ import annotations

from collections.abc import Iterable

from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.wire.messages import AdapterRef, AdaptersPinned

_FULL = (
    "pinned adapters may take half of the adapter memory together, and there is not enough of that left for this one; "
    "unpin another, or start the server with a larger --adapter-memory"
)


class Pins:
    """Belongs to the loop. `held` are in the pool and kept there."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._wanted: dict[str, AdapterRef] = {}
        self._refused: dict[str, str] = {}
        self._unanswered: list[int] = []  # calls
        self.held: set[str] = set()

    def replace(self, call_id: int, versions: Iterable[AdapterRef]) -> None:
        """These are to be pinned, and no others; answered once each is held or refused."""
        self._wanted = {ref.digest: ref for ref in versions}
        self._refused = {}
        self._unanswered.append(call_id)
        for digest in self.held - self._wanted.keys():
            self.held.discard(digest)
            self._pool.let_go(digest)

    def missing(self) -> list[AdapterRef]:
        """What is still to be brought into the pool."""
        return [ref for ref in self._wanted.values() if ref.digest not in self.held and ref.digest not in self._refused]

    def has_room(self, pages: int) -> bool:
        return self._pool.room.kept + pages <= self._pool.room.whole // 2

    def hold(self, digest: str) -> None:
        """Keep a resident version, unless that would be too many."""
        if not self.has_room(self._pool.pages_of(digest)):
            self.refuse(digest)
            return
        self._pool.keep(digest)
        self.held.add(digest)

    def refuse(self, digest: str, reason: str = _FULL) -> None:
        self._refused[digest] = reason

    def answers(self) -> list[AdaptersPinned]:
        """To the calls that are settled."""
        if self._unanswered and not self.missing():
            settled, self._unanswered = self._unanswered, []
            return [AdaptersPinned(call_id, dict(self._refused)) for call_id in settled]
        return []
