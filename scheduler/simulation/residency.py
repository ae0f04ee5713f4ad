"""Which adapters the simulated device holds, and which one waits for blocks of the store that requests use too.

An adapter that no running request uses is idle: it stays until its place or its blocks are needed, and its blocks count
as free. It knows nothing of requests but what it is told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from coserve.scheduler.simulation.streams import require


@dataclass
class Residency:
    places: int  # adapters at once
    sizes: dict[str, int] = field(default_factory=dict)  # blocks of an adapter; none: it does not lie in the store
    last_use: dict[str, float] = field(default_factory=dict)  # of those that are there
    kept_out: str | None = None  # the adapter that waits for blocks
    due: int = 0  # free blocks with which it is loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self.last_use)

    def __contains__(self, adapter: str | None) -> bool:
        return adapter in self.last_use

    def blocks(self, adapters: Collection[str]) -> int:
        return sum(self.sizes.get(a, 0) for a in adapters)

    def blocks_of(self, adapter: str | None) -> int:
        """If it is there."""
        return self.sizes.get(adapter or "", 0) if adapter in self.last_use else 0

    def load(self, wanted: Sequence[str], used: Collection[str], free: int, most: int, running: int,
             now: float) -> bool:  # fmt: skip
        """Load the most urgent missing adapter, evicting idle ones; False if all are there, or if it has to wait.

        It waits for its blocks, beside those of idle ones that are more urgent and two more for each running request.

        Args:
            free: blocks of nobody, those of idle adapters among them.
            most: of those, how many there would be if nothing ran.
        """
        require(len(wanted) <= self.places, "more adapters are wanted than there are places")
        self.kept_out, self.due = None, 0
        self.evict(wanted, used, free)
        missing = next((a for a in wanted if a not in self), None)
        if missing is None:
            return False
        if self.sizes.get(missing):
            ahead = [a for a in wanted[: wanted.index(missing)] if a in self and a not in used]
            need = self.blocks([missing, *ahead])
            if need + 2 * running > free:
                if need <= most:  # else those more urgent must have run first
                    self.kept_out, self.due = missing, need + 2 * running
                return False
        if len(self.last_use) >= self.places:
            idle = [a for a in self.last_use if a not in wanted]
            require(not set(used) & set(idle), "an adapter in use is not wanted")
            del self.last_use[min(idle, key=lambda a: self.last_use[a])]
        self.last_use[missing] = now
        self.evict(wanted, used, free)
        return True

    def evict(self, wanted: Sequence[str], used: Collection[str], free: int) -> None:
        """Idle ones whose blocks others have taken: those that nobody wants go first, then the least urgent."""
        idle = [a for a in self.last_use if a not in used and self.sizes.get(a)]
        idle.sort(key=lambda a: (a in wanted, -wanted.index(a) if a in wanted else self.last_use[a]))
        while idle and self.blocks(idle) > free:
            del self.last_use[idle.pop(0)]
