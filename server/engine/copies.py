"""The training copies of jobs in the adapter pool: who may have one now, within its tenant's share, and its values.

A copy stays until its job leaves the engine, so it counts against its tenant's adapter share all that time, and the
adapters of the tenant's requests have what is left of it. It never takes another tenant's share.
"""

from __future__ import annotations

from coserve.server.engine.adapter_pool import AdapterPool, PoolFull
from coserve.server.engine.running_job import RunningJob
from coserve.server.engine.shares import Shares
from coserve.server.training.job import TrainingJob

OWN_JOBS = "waiting for your own jobs: they hold your share of the adapter memory"
POOL = "waiting for adapter memory: adapters in use hold it"
_SMALLER = "use a smaller rank or fewer target modules"


class TrainingCopies:
    """Belongs to the loop."""

    def __init__(self, pool: AdapterPool, shares: Shares) -> None:
        self._pool, self._shares = pool, shares
        self._held: dict[str, tuple[str, int]] = {}  # key of a copy -> its tenant and pages
        self._waiting: set[str] = set()  # tenants of which a job has found no room in this turn
        self.lacks = 0  # blocks that the first such job waits for (`PoolRoom.lacks`)

    def turn(self) -> None:
        """Jobs are about to ask for places, the oldest first."""
        self._waiting.clear()
        self.lacks = 0

    def place(self, running: RunningJob, job: TrainingJob) -> str | None:
        """Put a job's copy into the pool if there is room; else `running.waits` says what for.

        Returns why there can never be room, or None.
        """
        pool, share = self._pool, self._shares.adapter_pages(job.tenant)
        wanted, room = pool.pages_wanted(job.params), pool.room.whole - pool.room.kept
        if wanted > room:
            return (
                f"{self._needs(wanted)} and the server has {room * pool.page_bytes} beside pinned adapters; "
                f"{_SMALLER}, or start the server with a larger --adapter-memory."
            )
        if share is not None and wanted > share:
            return f"{self._needs(wanted)} and your share of the server's is {share * pool.page_bytes}; {_SMALLER}."
        held = sum(pages for tenant, pages in self._held.values() if tenant == job.tenant)
        if job.tenant in self._waiting or (share is not None and held + wanted > share):
            self._waiting.add(job.tenant)  # younger ones do not overtake it
            running.waits = OWN_JOBS
            return None
        try:
            pool.load(running.key, job.params, pinned=True, fold_scaling=False)
        except PoolFull:
            running.waits = POOL
            self.lacks = self.lacks or pool.room.lacks(wanted)
            return None
        running.waits = None
        self._held[running.key] = job.tenant, wanted
        self._shares.hold(job.tenant, wanted)
        return None

    def pages(self, running: RunningJob) -> int:
        """Of its copy; 0: it has none."""
        return self._held.get(running.key, ("", 0))[1]

    def _needs(self, pages: int) -> str:
        return f"The adapter needs {pages * self._pool.page_bytes} bytes of adapter memory"

    def refresh(self, running: RunningJob) -> None:
        """The copy is rounded again from the master weights, after each step."""
        if running.job is not None and running.key in self._pool:
            for name, pair in running.job.params.items():
                self._pool.overwrite(running.key, name, pair.a, pair.b)

    def remove(self, running: RunningJob) -> None:
        """Give a copy's pages back, if there is one."""
        if running.key in self._pool:
            self._pool.unpin(running.key)
            self._pool.unload(running.key)
        tenant, pages = self._held.pop(running.key, (None, 0))
        if tenant is not None:
            self._shares.hold(tenant, -pages)
