"""Keeps the engine's pinned adapters those of the database: after a restart, a new version, a pin or a deletion.

The database says which adapters are pinned, their newest versions are what the engine holds. A pin is only entered
when the engine has it. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging

from coserve.server.gateway.engine_client import EngineClient, EngineUnavailable
from coserve.server.gateway.refusals import Conflict, Unavailable
from coserve.server.store.adapters import Adapter, AdapterVersion
from coserve.server.store.store import Store
from coserve.server.wire.messages import AdapterRef, EngineReady

log = logging.getLogger("coserve.adapters")

_LOOK_SECONDS = 5.0  # after which a new version of a pinned adapter is noticed at the latest


class Pins:
    def __init__(self, store: Store, engine: EngineClient, *, look_seconds: float = _LOOK_SECONDS) -> None:
        self._store = store
        self._engine = engine
        self._look_seconds = look_seconds
        self._lock = asyncio.Lock()  # the engine is told one set after the other
        self._told: tuple[AdapterRef, ...] = ()
        self._news = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._engine.subscribe(EngineReady, self._ready)
        self._worker = asyncio.create_task(self._work(), name="pins")

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def pin(self, adapter: Adapter) -> Adapter | None:
        """Pins an adapter; None if it is gone. Raises Conflict without room for it, Unavailable without an engine."""
        async with self._lock:
            newest = await self._store.adapters.newest_version(adapter.tenant, adapter.id)
            if newest is not None and not adapter.pinned:
                pinned = await self._store.adapters.all_pinned_for_recovery()
                try:
                    refused = await self._tell(_refs((*pinned, newest)))
                except EngineUnavailable:
                    raise Unavailable(
                        "The engine, which has to make room for it, is not available; try again in a moment.",
                        "engine_unavailable",
                    ) from None
                if newest.digest in refused:
                    self._news.set()  # the engine forgets about it
                    raise Conflict(f"The adapter cannot be pinned: {refused[newest.digest]}.", "adapter_memory_full")
            return await self._store.adapters.set_pinned(adapter.tenant, adapter.id, True)

    async def unpin(self, adapter: Adapter) -> Adapter | None:
        """None if it is gone."""
        changed = await self._store.adapters.set_pinned(adapter.tenant, adapter.id, False)
        self._news.set()
        return changed

    def _ready(self, _: EngineReady) -> None:
        self._told = ()  # it may be another process, which holds none
        self._news.set()

    async def _work(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._look_seconds):
                    await self._news.wait()
            except TimeoutError:
                log.debug("looking for new versions of pinned adapters")
            self._news.clear()
            try:
                await self._follow()
            except EngineUnavailable:
                log.debug("pinned adapters wait for the engine")
            except Exception:
                log.exception("the engine could not be told which adapters are pinned; trying again")

    async def _follow(self) -> None:
        """Tell the engine if what is pinned is not what it was told."""
        async with self._lock:
            wanted = _refs(await self._store.adapters.all_pinned_for_recovery())
            if wanted != self._told and self._engine.engine is not None:
                for digest, why in (await self._tell(wanted)).items():
                    log.warning("the pinned version %s is not held: %s", digest[:12], why)

    async def _tell(self, versions: tuple[AdapterRef, ...]) -> dict[str, str]:
        """What is refused, by digest."""
        answer = await self._engine.pin_adapters(versions)
        self._told = versions
        return answer.refused


def _refs(versions: tuple[AdapterVersion, ...]) -> tuple[AdapterRef, ...]:
    return tuple({version.digest: AdapterRef(version.digest, version.path) for version in versions}.values())
