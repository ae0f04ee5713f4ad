"""Which finetuning jobs start next: first come, first served, and one suspect at a time. Pure decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CRASHES_ALLOWED = 3


@dataclass(frozen=True, slots=True)
class Waiting:
    job_id: str
    crashes: int  # engine crashes since the job last made progress


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
