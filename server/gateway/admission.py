"""Whether a generation request may enter now: bounds on what waits, and an engine to wait for. Decides at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from coserve.server.gateway.engine_client import EngineClient
from coserve.server.gateway.refusals import QueueFull, Unavailable


@dataclass
class Place:
    """What one request holds of the queue: `waiting` sequences that have no token yet."""

    tenant: str
    waiting: int


class Admission:
    """Counts the sequences that wait for their first token, in all and for each tenant."""

    def __init__(self, engine: EngineClient, *, max_waiting: int, max_waiting_tenant: int) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._max_waiting_tenant = max_waiting_tenant
        self._waiting: Counter[str] = Counter()
        self.draining = False

    @property
    def waiting(self) -> int:
        return self._waiting.total()

    @contextmanager
    def enter(self, tenant: str, sequences: int) -> Iterator[Place]:
        """Takes a place for as many sequences. Raises QueueFull, Unavailable."""
        self.check(tenant, sequences)
        place = Place(tenant, sequences)
        self._waiting[tenant] += sequences
        try:
            yield place
        finally:
            self._release(place, place.waiting)

    def started(self, place: Place) -> None:
        """One of the place's sequences has its first token, or has ended without one."""
        self._release(place, 1)

    def check(self, tenant: str, sequences: int) -> None:
        """Raises QueueFull or Unavailable if as many more sequences of the tenant may not wait."""
        if self.draining:
            raise Unavailable("The server is shutting down; try again in a moment.", "draining")
        if not self._engine.accepts_work:
            raise Unavailable("The engine is not ready; try again in a moment.", "engine_unavailable")
        if self._waiting[tenant] + sequences > self._max_waiting_tenant:
            raise QueueFull(
                f"{self._waiting[tenant]} of your sequences are waiting and {sequences} more were asked for; "
                f"at most {self._max_waiting_tenant} may wait. Send fewer at once.",
                "rate_limit_exceeded",
            )
        if self.waiting + sequences > self._max_waiting:
            raise QueueFull(
                f"The server's queue of {self._max_waiting} sequences is full; try again in a moment.",
                "rate_limit_exceeded",
            )

    def _release(self, place: Place, count: int) -> None:
        count = min(count, place.waiting)
        place.waiting -= count
        self._waiting[place.tenant] -= count
        if self._waiting[place.tenant] <= 0:
            del self._waiting[place.tenant]
