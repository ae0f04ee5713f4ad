"""Which finetuning jobs start next: tenants take turns, and one suspect goes at a time. Pure decisions."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

CRASHES_ALLOWED = 3


@dataclass(frozen=True, slots=True)
class Waiting:
    job_id: str
    crashes: int  # engine crashes since the job last made progress
    tenant: str = ""


def in_turns(queue: Sequence[Waiting], running: Mapping[str, int]) -> list[Waiting]:
    """Jobs that wait (oldest first) in the order in which they start: each slot goes to the tenant that has fewest
    jobs running, or about to, and its oldest one. With one tenant that is first come, first served."""
    of_tenant: dict[str, deque[Waiting]] = {}
    for job in queue:
        of_tenant.setdefault(job.tenant, deque()).append(job)
    turns = [(running.get(tenant, 0), place, tenant) for place, tenant in enumerate(of_tenant)]
    heapify(turns)
    ordered = []
    while turns:
        count, place, tenant = turns[0]
        ordered.append(of_tenant[tenant].popleft())
        if of_tenant[tenant]:
            heapreplace(turns, (count + 1, place, tenant))
        else:
            heappop(turns)
    return ordered


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
