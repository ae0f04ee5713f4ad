"""How many pages there are for adapters, and who has them, counted by whole units of the pool's source.

Loads may take what nobody has and what idle adapters have that are not reserved, as far as the adapters' part of the
memory goes. Nothing here moves memory.
"""

from __future__ import annotations

from coserve.server.engine.page_source import PageSource
from coserve.server.engine.residents import Residents


class PoolRoom:
    """Of one pool, as its residents are."""

    def __init__(self, source: PageSource, residents: Residents) -> None:
        self._source, self._residents = source, residents
        self.whole = source.most_units * source.unit_pages  # that adapters may have together
        self.left_free = 0  # units that no load takes: sequences that run will want them

    @property
    def used(self) -> int:
        """Of all resident adapters."""
        return sum(r.pages for r in self._residents)

    @property
    def loose(self) -> int:
        """Of those that nobody uses and that are not reserved."""
        reserved = set(self._residents.reserved)
        return sum(self._residents[key].pages for key in self._residents.idle if key not in reserved)

    @property
    def kept(self) -> int:
        """Of those that are kept whether or not they are used."""
        return sum(r.pages for r in self._residents if r.kept)

    @property
    def held(self) -> int:
        """That no end of a request gives back: of training copies, and of adapters that are kept."""
        return sum(r.pages for r in self._residents if r.kept or r.pinned)

    @property
    def free(self) -> int:
        """That a load could get now without evicting anybody."""
        return min(self._unheld, self.whole - self.used)

    @property
    def available(self) -> int:
        """That a load could get now."""
        return min(self._unheld + self.loose, self.allowed)

    @property
    def allowed(self) -> int:
        """That a load could get if only adapters had any memory."""
        return self.whole - self.used + self.loose

    def rounded(self, pages: int) -> int:
        """Of the units that so many pages take."""
        return -(-pages // self._source.unit_pages) * self._source.unit_pages

    def lacks(self, wanted: int) -> int:
        """Units that have to be free, by the count of who lends them (those of all idle adapters included), before a
        load that is not possible now can have `wanted` pages. 0: it is not they that are short, adapters have them."""
        if wanted > self.allowed:
            return 0
        reserved = sum(len(self._residents[key].units) for key in self._residents.reserved)
        return wanted // self._source.unit_pages + self.left_free + reserved

    @property
    def _unheld(self) -> int:
        return max(0, self._source.free_units - self.left_free) * self._source.unit_pages
