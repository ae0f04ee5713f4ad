"""Where a waiting request stands, why it waits, and how long it may take: for people, never for plans.

It may assume that `note` is told of every plan. An expected wait is the place in the queue times what an admission has
lately taken while something waited; before the first one there is nothing to go by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coserve.scheduler.admission import AdmissionPolicy
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.state import RequestState, SchedulerState

_NEWEST = 0.1  # weight of the newest admission's seconds


@dataclass(frozen=True, slots=True)
class Queued:
    request_id: str
    position: int  # 1: the next one
    reason: str
    wait_seconds: float | None  # None: nothing to go by yet


class QueueClock:
    """Learns how long an admission takes while something waits."""

    def __init__(self) -> None:
        self._since: float | None = None  # when the first of those that wait began to, or the last one was admitted
        self._interval: float | None = None

    def note(self, now: float, waiting: bool, admitted: int) -> None:
        """`waiting`: somebody is left in the queue after `admitted` were admitted."""
        if admitted and self._since is not None:
            each = (now - self._since) / admitted
            self._interval = each if self._interval is None else self._interval + _NEWEST * (each - self._interval)
        if not waiting:
            self._since = None
        elif admitted or self._since is None:
            self._since = now

    def forecast(self, state: SchedulerState, lineup: Lineup, policy: AdmissionPolicy) -> tuple[Queued, ...]:
        """All that wait, in the order in which they would be admitted now."""
        waiting: Iterable[RequestState] = (r for r in lineup if not r.running)
        return tuple(
            Queued(r.request_id, place, policy.reason(r), None if self._interval is None else place * self._interval)
            for place, r in enumerate(waiting, start=1)
        )
