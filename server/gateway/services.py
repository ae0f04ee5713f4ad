"""What the routes work with: one object of everything that lives as long as the gateway process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coserve.server.config import Settings
from coserve.server.gateway.engine_client import EngineClient
from coserve.server.gateway.generation import GenerationService
from coserve.server.gateway.text import TextModel
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.store import Store
from coserve.server.telemetry.metrics import Metrics
from coserve.server.tenancy.authentication import Authenticator
from coserve.server.tenancy.terms import Terms

if TYPE_CHECKING:
    from coserve.server.gateway.adapter_service import AdapterService
    from coserve.server.gateway.file_service import FileService
    from coserve.server.gateway.job_controller import JobController
    from coserve.server.gateway.job_service import JobService


@dataclass
class Services:
    """Made once by the gateway's start; `draining` is the only field that changes afterwards."""

    settings: Settings
    data: DataDirectory
    store: Store
    authenticator: Authenticator
    engine: EngineClient
    text: TextModel
    generation: GenerationService
    metrics: Metrics
    files: FileService
    adapters: AdapterService
    controller: JobController
    jobs: JobService
    terms: Terms
    draining: bool = False
    started_at: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    @property
    def ready(self) -> bool:
        return self.engine.ready and not self.draining
