"""The least that training gets: a share of the time, owed to the oldest sweep of each priority.

It may assume that sweeps come in the order in which training goes to them, and that it is told of every iteration. It
knows how much time is owed; which unit that pays for is the filler's to find out (`training`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coserve.scheduler.progress import PRIORITIES, SweepProgress, priority_of
from coserve.scheduler.state import SweepState

_LEAST = 0.125  # of a promise: a smaller debt is not worth a unit yet


class Floor:
    """`share`: of all time; `promise`: seconds that an iteration may take, which is also the most by which what a sweep
    got can be ahead of its share."""

    def __init__(self, share: float, promise: float) -> None:
        self._share, self._most, self._least = share, promise, _LEAST * promise
        self._owed = dict.fromkeys(PRIORITIES, 0.0)

    def debts(self, sweeps: Iterable[SweepState]) -> list[tuple[SweepState, float]]:
        """The sweeps that time is owed to, normal before low, and how much."""
        owed = [(p, seconds) for p, seconds in self._owed.items() if seconds > self._least]
        oldest = [(_oldest(sweeps, p), seconds) for p, seconds in owed]
        return [(sweep, seconds) for sweep, seconds in oldest if sweep is not None]

    def forget(self) -> None:
        """There is nobody to owe to."""
        self._owed = dict.fromkeys(PRIORITIES, 0.0)

    def settle(self, sweeps: Iterable[SweepState], seconds: float, trained: Mapping[int, float]) -> None:
        """Account for an iteration of `seconds`, `trained` of which went to the sweeps with these ids."""
        for p in PRIORITIES:
            oldest = _oldest(sweeps, p)
            if oldest is None:
                self._owed[p] = 0.0
                continue
            owed = self._owed[p] + self._share * seconds - trained.get(oldest.sweep_id, 0.0)
            # Time above the share counts against it, but for one iteration at most: a sweep that had the device to
            # itself for an hour is not held back for it when streams come.
            self._owed[p] = max(owed, -self._most)


def _oldest(sweeps: Iterable[SweepState], priority: str) -> SweepState | None:
    return next((s for s in sweeps if priority_of(s) == priority and not SweepProgress(s).done), None)
