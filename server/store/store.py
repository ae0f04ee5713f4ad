"""The repositories over one database, opened and closed together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from coserve.server.store.adapters import Adapters
from coserve.server.store.checkpoints import Checkpoints
from coserve.server.store.database import Database
from coserve.server.store.files import Files
from coserve.server.store.job_events import JobEvents
from coserve.server.store.job_progress import JobProgress
from coserve.server.store.jobs import Jobs
from coserve.server.store.keys import ApiKeys
from coserve.server.store.permissions import Permissions
from coserve.server.store.resolve import Models
from coserve.server.store.tenants import Tenants
from coserve.server.store.usage import UsageLedger


class Store:
    """Only the gateway process opens one. Methods are coroutines and take the tenant first."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open, or create, the database file at `path`. Raises StoreUnavailable."""
        self._database = Database(path)
        self.tenants = Tenants(self._database, clock)
        self.keys = ApiKeys(self._database, clock)
        self.files = Files(self._database, clock)
        self.jobs = Jobs(self._database, clock)
        self.progress = JobProgress(self._database, clock)
        self.events = JobEvents(self._database)
        self.checkpoints = Checkpoints(self._database)
        self.adapters = Adapters(self._database, clock)
        self.models = Models(self._database)
        self.permissions = Permissions(self._database, clock)
        self.usage = UsageLedger(self._database, clock)

    def close(self) -> None:
        """Finish what was submitted and close the file. Idempotent."""
        self._database.close()
