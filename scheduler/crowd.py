"""How many streams may run before one tenant's crowd slows another tenant's first tokens.

It may assume nothing about who waits. It never holds back a tenant that has the server to itself: a flood may cost its
own tenant its promises, never another one.

Decodes always run, and a prompt gets what they leave of the inter-token promise. So with several tenants about, a
tenant that has its part of the streams is admitted only while all decodes together would leave room for prompts; the
least-served one, while they would keep the promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from coserve.scheduler.state import RequestState

_LARGEST = 4096


class Crowd:
    """`least`: streams that leave room for prompts; `most`: streams that keep the promise at all; `parts`:
    of `least`, what each tenant may have in any case. `parts` None: no limit."""

    def __init__(self, least: int = 0, most: int = 0, parts: Mapping[str, float] | None = None) -> None:
        self._least, self._most, self._parts = least, most, parts
        self._running: Counter[str] = Counter()

    def begin(self, running: Iterable[RequestState]) -> None:
        if self._parts is not None:
            self._running = Counter(r.tenant for r in running)

    def admit(self, tenant: str) -> None:
        self._running[tenant] += 1

    def has_room(self, tenant: str, least_served: bool) -> bool:
        """For one more request of the tenant. One may always run."""
        if self._parts is None or self._running.total() < (self._most if least_served else self._least):
            return True
        return self._running[tenant] < max(1.0, self._parts.get(tenant, 0.0))


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
