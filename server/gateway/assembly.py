"""Builds everything that lives as long as the gateway, in order, and takes it down in the opposite order."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

from coserve.server.config import Settings
from coserve.server.data.tokenizer import Tokenizer
from coserve.server.gateway.adapter_service import AdapterService
from coserve.server.gateway.admission import Admission
from coserve.server.gateway.engine_client import EngineClient
from coserve.server.gateway.file_service import FileService
from coserve.server.gateway.generation import GenerationService
from coserve.server.gateway.job_controller import JobController
from coserve.server.gateway.job_preparation import Preparer
from coserve.server.gateway.job_service import JobService
from coserve.server.gateway.job_slots import JobSlots
from coserve.server.gateway.pins import Pins
from coserve.server.gateway.services import Services
from coserve.server.gateway.text import TextModel
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.store import Store
from coserve.server.telemetry.metrics import Metrics
from coserve.server.tenancy.admin_key import load_admin_key
from coserve.server.tenancy.authentication import Authenticator

log = logging.getLogger("coserve.gateway")


async def assemble(settings: Settings, socket_path: str, leave: AsyncExitStack) -> Services:
    """The running services; `leave` ends them. Raises StoreError, TokenizerError, ChatTemplateError."""
    data = DataDirectory(settings.data_dir)
    store = Store(data.database)
    leave.callback(store.close)
    authenticator = Authenticator(store, load_admin_key(data.admin_key))
    await authenticator.start()

    folder = await asyncio.to_thread(tokenizer_folder, settings.model)
    text = TextModel(await asyncio.to_thread(Tokenizer.from_folder, folder))
    metrics = Metrics()
    engine = EngineClient(
        socket_path,
        silence_seconds=settings.engine_silence_seconds,
        patience_seconds=settings.engine_patience_seconds,
        accept=lambda engine: data.bind_base(engine.base_digest),
    )
    metrics.watch(engine)
    admission = Admission(engine, max_waiting=settings.max_waiting, max_waiting_tenant=settings.max_waiting_tenant)
    generation = GenerationService(engine, text, store, admission, metrics)

    files = FileService(store, data)
    pins = Pins(store, engine)
    adapters = AdapterService(
        store, data, engine, pins, base_model_id=settings.base_model_id, max_bytes=settings.max_upload
    )
    preparer = Preparer(store, data, files, text.tokenizer)
    leave.callback(preparer.close)
    slots = JobSlots(settings.max_jobs_running, settings.job_slice_seconds)
    controller = JobController(store, data, engine, files, preparer, slots=slots, terms=settings.terms)
    jobs = JobService(
        store,
        data,
        engine,
        controller,
        base_model_id=settings.base_model_id,
        most_queued=settings.max_jobs_queued_tenant,
        most_running=settings.max_jobs_running,
    )
    await files.remove_orphans()
    await adapters.start()
    leave.push_async_callback(adapters.close)
    await pins.start()
    leave.push_async_callback(pins.close)
    await controller.start()
    leave.push_async_callback(controller.close)
    books = asyncio.create_task(generation.keep_books(), name="usage-of-running-requests")
    leave.callback(books.cancel)
    await engine.start()  # last: whoever listens to the engine is there by now
    leave.push_async_callback(engine.close)
    return Services(
        settings=settings,
        data=data,
        store=store,
        authenticator=authenticator,
        engine=engine,
        text=text,
        generation=generation,
        metrics=metrics,
        files=files,
        adapters=adapters,
        controller=controller,
        jobs=jobs,
        terms=settings.terms,
    )


async def drain(services: Services, grace_seconds: float) -> None:
    """Lets nothing new in and waits for what runs, at most `grace_seconds`."""
    services.draining = services.generation.admission.draining = True
    services.controller.drain()
    await services.generation.drain(grace_seconds)


def tokenizer_folder(model: str) -> Path:
    """The folder of a local model, or of a hub model's tokenizer files, which are fetched if need be."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja"]))
