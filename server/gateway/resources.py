"""Files, adapters and jobs of all tenants: the services behind them, built together, started and closed in order."""

from __future__ import annotations

from dataclasses import dataclass

from coserve.server.config import Settings
from coserve.server.data.tokenizer import Tokenizer
from coserve.server.gateway.adapter_service import AdapterService
from coserve.server.gateway.engine_client import EngineClient
from coserve.server.gateway.file_service import FileService
from coserve.server.gateway.job_controller import JobController
from coserve.server.gateway.job_preparation import Preparer
from coserve.server.gateway.job_service import JobService
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.store import Store


@dataclass(frozen=True, slots=True)
class Resources:
    data: DataDirectory
    files: FileService
    adapters: AdapterService
    jobs: JobService
    controller: JobController
    preparer: Preparer

    @classmethod
    def build(
        cls, settings: Settings, store: Store, data: DataDirectory, engine: EngineClient, tokenizer: Tokenizer
    ) -> Resources:
        files = FileService(store, data)
        preparer = Preparer(store, data, files, tokenizer)
        controller = JobController(store, data, engine, files, preparer, most_running=settings.max_jobs_running)
        return cls(
            data=data,
            files=files,
            adapters=AdapterService(
                store, data, engine, base_model_id=settings.base_model_id, max_bytes=settings.max_upload
            ),
            jobs=JobService(
                store, data, engine, controller, base_model_id=settings.base_model_id,
                most_queued=settings.max_jobs_queued_tenant, most_running=settings.max_jobs_running,
            ),
            controller=controller,
            preparer=preparer,
        )  # fmt: skip

    async def start(self) -> None:
        """Clear up after a crash and take up where it left. Call before the first request, with the tenants there."""
        await self.files.remove_orphans()
        await self.adapters.start()
        await self.controller.start()

    async def close(self) -> None:
        await self.controller.close()
        self.preparer.close()
        await self.adapters.close()
