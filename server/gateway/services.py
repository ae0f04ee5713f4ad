"""What the routes work with: one object of everything that lives as long as the gateway process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coserve.server.config import Settings
from coserve.server.gateway.engine_client import EngineClient

if TYPE_CHECKING:
    from coserve.server.api.auth import Authenticator
    from coserve.server.gateway.generation import GenerationService
    from coserve.server.gateway.text import TextModel
    from coserve.server.store import Store
    from coserve.server.telemetry.metrics import Metrics


@dataclass
class Services:
    """Made once by the gateway's start; `draining` is the only field that changes afterwards."""

    settings: Settings
    store: Store
    authenticator: Authenticator
    engine: EngineClient
    text: TextModel
    generation: GenerationService
    metrics: Metrics
    draining: bool = False

    @property
    def ready(self) -> bool:
        return self.engine.ready and not self.draining
