"""What a packed forward gives up when it cannot run as planned: pure decisions, in the order in which they cost least.

Nothing of a forward that ended in an exception was booked, so any part of it can run again, in another company.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coserve.scheduler.state import Prefill, Ride

LEAST_CHUNK = 16  # prompt tokens: fewer rows save nothing worth having


@dataclass(frozen=True, slots=True)
class Load:
    """What goes through the layers together."""

    decodes: tuple[str, ...] = ()
    prefills: tuple[Prefill, ...] = ()
    rides: tuple[Ride, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.decodes or self.prefills or self.rides)


@dataclass(frozen=True, slots=True)
class Relief:
    """`loads` run instead, one after the other; `failed` is the request that is given up; `halved` the prompt whose
    chunks are to be no longer than this from now on."""

    loads: tuple[Load, ...] = ()
    failed: str | None = None
    halved: Prefill | None = None


def smaller(load: Load) -> Relief:
    """For a load without rides that took too much memory: the newest prompt takes shorter chunks, then it goes; then
    the newer half of the decodes waits for the next iteration."""
    if load.prefills:
        *older, newest = load.prefills
        if newest.tokens > LEAST_CHUNK:
            halved = Prefill(newest.request_id, max(LEAST_CHUNK, newest.tokens // 2))
            return Relief((replace(load, prefills=(*older, halved)),), halved=halved)
        return Relief((replace(load, prefills=tuple(older)),), failed=newest.request_id)
    if len(load.decodes) > 1:
        return Relief((replace(load, decodes=load.decodes[: len(load.decodes) // 2]),))
    return Relief(failed=load.decodes[0])


def apart(load: Load) -> Relief:
    """For a load without rides that failed for another reason: each of its requests by itself, to find whose it is."""
    alone = [Load(decodes=(request_id,)) for request_id in load.decodes]
    alone += [Load(prefills=(prefill,)) for prefill in load.prefills]
    if len(alone) == 1:
        return Relief(failed=(*load.decodes, *(p.request_id for p in load.prefills))[0])
    return Relief(tuple(alone))
