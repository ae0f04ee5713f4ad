"""Who has the job slots, since when, and whose job gives its slot back. Belongs to the controller; reads no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coserve.server.gateway.job_queue import Holding, Waiting, in_turns, to_start, to_yield
from coserve.server.store.jobs import Job
from coserve.server.store.transitions import QUEUED, RUNNING


@dataclass(frozen=True, slots=True)
class Moves:
    start: Sequence[str]  # jobs that get a slot
    yielding: str | None = None  # the one that gives its slot back; one at a time


@dataclass(frozen=True, slots=True)
class _Since:
    at: float  # the caller's seconds
    step: int


class JobSlots:
    """Times are the caller's. Only what is decided here is forgotten with the gateway: a slice then begins anew."""

    def __init__(self, most: int, slice_seconds: float) -> None:
        self.most = most
        self._slice = slice_seconds
        self._since: dict[str, _Since] = {}
        self._yielding: str | None = None

    def taken(self, job: Job, now: float) -> None:
        self._since[job.id] = _Since(now, job.progress.get("step") or 0)

    def free(self, job_id: str) -> bool:
        """The engine has let go of a job. True if it was to give its slot back."""
        self._since.pop(job_id, None)
        yielded = self._yielding == job_id
        if yielded:
            self._yielding = None
        return yielded

    def clear(self) -> None:
        """Another engine, or a new connection to it."""
        self._since.clear()
        self._yielding = None

    def moves(
        self, jobs: Sequence[Job], active: Mapping[str, int], weights: Mapping[str, float], idle: frozenset[str],
        now: float,
    ) -> Moves:  # fmt: skip
        """What happens next. `jobs`: queued and running ones, oldest first; `active`: those that the engine has, with
        their crashes; `idle`: those of them that have not begun to train."""
        waiting = [job for job in jobs if job.id not in active and job.requested != "pause"]
        again = [Waiting(job.id, job.crashes) for job in waiting if job.status == RUNNING]  # those that ran before
        queue = [Waiting(job.id, job.crashes, job.tenant) for job in waiting if job.status == QUEUED]
        running = [job for job in jobs if job.id in active or job.status == RUNNING]
        turns = in_turns(queue, Counter(job.tenant for job in running), weights)
        start = to_start([*again, *turns], active, self.most)
        if start or self._yielding is not None:
            return Moves(start)
        holding = [
            Holding(job.id, job.tenant, job.training.get("priority") == "low", self._had_its_slice(job, idle, now))
            for job in running
        ]
        self._yielding = to_yield(holding, [one for one in queue if not one.crashes], weights, self.most)
        return Moves(start, self._yielding)

    def _had_its_slice(self, job: Job, idle: frozenset[str], now: float) -> bool:
        """A slice of time, and a step in it: else pauses could keep a job with long steps from ever doing one."""
        since = self._since.get(job.id)
        if since is None or job.requested is not None or now < since.at + self._slice:
            return False
        return job.id in idle or (job.progress.get("step") or 0) > since.step
