"""Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one.

The outcome depends on the text only, never on how it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feeds on one sequence's text. After a hit nothing more is taken."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._include = include
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now safe to show. `hit` is set once a stop string is complete: the first to end wins."""
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            end, start, self.hit = min(found)
            shown = self._held[: end if self._include else start]
            self._held = ""
            return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def pass_through(self, text: str) -> str:
        """Text that is not searched, because a minimum of tokens is not reached; a stop string cannot begin in it."""
        shown, self._held = self._held + text, ""
        return shown

    def finish(self) -> str:
        """The text that was held back, when no more will come."""
        shown, self._held = self._held, ""
        return shown

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
