"""How many streams may run before one tenant's crowd slows another tenant's first tokens.

It may assume nothing about who waits. It never holds back a tenant that has the server to itself: a flood may cost its
own tenant its promises, never another one.

Decodes always run, and a prompt gets what they leave of the inter-token promise. So with several tenants about, a
tenant that has its part of the streams is admitted only while all decodes together would leave room for prompts; the
least-served one, while they would keep the promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from coserve.scheduler.state import RequestState

_LARGEST = 4096


class Crowd:
    """`seconds(n)`: what the decodes of n streams take, never less for more of them; None: no limit. `least` seconds
    leave room for other tenants' prompts, `most` keep the promise at all. `divide(n)`: what each tenant may have in any
    case, where n streams take `least`."""

    def __init__(self, seconds: Callable[[int], float] | None = None, least: float = 0.0, most: float = 0.0,
                 divide: Callable[[float], Mapping[str, float]] = lambda whole: {}) -> None:  # fmt: skip
        self._seconds, self._least, self._most, self._divide = seconds, least, most, divide
        self.begin(())

    def begin(self, running: Sequence[RequestState]) -> None:
        """A queue is about to be admitted beside these; it may be asked anew."""
        self._began, self._streams = running, len(running)
        self._running: Counter[str] | None = None  # counted when it is asked for
        self._admitted: Counter[str] = Counter()

    def admit(self, tenant: str) -> None:
        self._admitted[tenant] += 1
        self._streams += 1

    def has_room(self, tenant: str, least_served: bool) -> bool:
        """For one more request of the tenant. One may always run."""
        if self._seconds is None or self._seconds(self._streams + 1) <= (self._most if least_served else self._least):
            return True
        if self._running is None:
            self._running = Counter([r.tenant for r in self._began])
        return self._running[tenant] + self._admitted[tenant] < max(1.0, self._parts.get(tenant, 0.0))

    @cached_property
    def _parts(self) -> Mapping[str, float]:
        return {} if self._seconds is None else self._divide(largest_crowd(self._seconds, self._least))


def largest_crowd(seconds: Callable[[int], float], limit: float) -> int:
    """The most streams whose decodes take `limit` seconds at most, by doubling and halving; at least 1. `seconds(n)`
    must not fall with n."""
    low = 1
    while low < _LARGEST and seconds(2 * low) <= limit:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low
