"""Which finetuning jobs start next, and which gives its slot back: tenants take turns, and one suspect goes at a time.
Pure decisions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

CRASHES_ALLOWED = 3


@dataclass(frozen=True, slots=True)
class Waiting:
    job_id: str
    crashes: int  # engine crashes since the job last made progress
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Holding:
    """A job that has a slot."""

    job_id: str
    tenant: str
    low: bool  # its priority
    may_yield: bool  # has had its slice


def in_turns(queue: Sequence[Waiting], running: Mapping[str, int], weights: Mapping[str, float]) -> list[Waiting]:
    """Jobs that wait (oldest first) in the order in which they start: each slot goes to the tenant that has fewest
    jobs running, or about to, for its weight, and its oldest one. With one tenant that is first come, first served."""
    of_tenant: dict[str, deque[Waiting]] = {}
    for job in queue:
        of_tenant.setdefault(job.tenant, deque()).append(job)
    turns = [
        (running.get(tenant, 0) / weights.get(tenant, 1.0), place, tenant) for place, tenant in enumerate(of_tenant)
    ]
    heapify(turns)
    ordered = []
    while turns:
        level, place, tenant = turns[0]
        ordered.append(of_tenant[tenant].popleft())
        if of_tenant[tenant]:
            heapreplace(turns, (level + 1.0 / weights.get(tenant, 1.0), place, tenant))
        else:
            heappop(turns)
    return ordered


def to_yield(
    holding: Sequence[Holding], queue: Sequence[Waiting], weights: Mapping[str, float], most: int
) -> str | None:
    """The job that gives its slot to the first that waits, or None.

    All slots are taken, and the tenant that gives one up still has as many jobs running for its weight as the one that
    gets it: so no slot goes to and fro. It loses a low job before a normal one, and the youngest of them. Whoever has
    one job running keeps it.
    """
    if len(holding) < most or not queue:
        return None
    counts = Counter(job.tenant for job in holding)
    waiter = in_turns(queue, counts, weights)[0].tenant
    least = (counts[waiter] + 1) / weights.get(waiter, 1.0)
    levels = {t: (n - 1) / weights.get(t, 1.0) for t, n in counts.items() if n > 1 and t != waiter}
    for tenant in sorted(levels, key=levels.__getitem__, reverse=True):
        able = [job for job in holding if job.tenant == tenant and job.may_yield]
        if levels[tenant] >= least and able:
            return next((job for job in reversed(able) if job.low), able[-1]).job_id
    return None


def to_start(waiting: Sequence[Waiting], active: Mapping[str, int], most: int) -> list[str]:
    """Ids to start now, given what waits (oldest first) and what the engine has (id -> crashes).

    An engine that crashed may have been brought down by any of its jobs. Those go back one at a time, the least
    suspected first, until each has made progress: a job that always crashes the engine then only convicts itself.
    """
    started: list[str] = []
    suspected = any(crashes > 0 for crashes in active.values())
    room = most - len(active)
    suspects = sorted(job.crashes for job in waiting if job.crashes > 0)
    for job in waiting:
        if room <= 0:
            break
        if job.crashes > 0:
            if suspected or job.crashes > suspects[0]:
                continue
            suspected = True
        started.append(job.job_id)
        room -= 1
    return started
