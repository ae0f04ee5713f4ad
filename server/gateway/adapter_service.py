"""Adapters that tenants upload, pin, download and delete. What the files mean is the engine's to check."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coserve.server.gateway import adapter_folders
from coserve.server.gateway.adapter_archive import ArchiveError, extract_adapter, pack_adapter, packed_size
from coserve.server.gateway.engine_client import EngineClient, EngineUnavailable
from coserve.server.gateway.pins import Pins
from coserve.server.gateway.refusals import Conflict, Invalid, NotFound, Unavailable
from coserve.server.store.adapters import Adapter, AdapterVersion
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.ids import ADAPTER, new_id
from coserve.server.store.store import Store
from coserve.server.store.transitions import FINAL
from coserve.server.wire.messages import AdapterChecked

log = logging.getLogger("coserve.adapters")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOKS_LIKE_AN_ID = re.compile(r"(?:adapter|ftjob)-[0-9A-Za-z]{22}")
_RETRY_SECONDS = 5.0
_ENGINE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Download:
    filename: str
    size: int
    parts: Iterator[bytes]


class AdapterService:
    def __init__(
        self, store: Store, data: DataDirectory, engine: EngineClient, pins: Pins, *, base_model_id: str,
        max_bytes: int,
    ) -> None:  # fmt: skip
        self._store = store
        self._data = data
        self._engine = engine
        self._pins = pins
        self._base_model_id = base_model_id
        self._max_bytes = max_bytes
        self._changing = asyncio.Lock()  # a version is not added to an adapter that is being deleted
        self._removals: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Remove what a crash left half done, and go on with removals that it interrupted."""
        deleted = await self._store.adapters.all_deleted_versions_for_recovery()
        live = await self._store.adapters.all_versions_for_recovery()
        await asyncio.to_thread(adapter_folders.remove_orphans, self._data, [*live, *deleted])
        by_adapter: dict[tuple[str, str], list[AdapterVersion]] = {}
        for version in deleted:
            by_adapter.setdefault((version.tenant, version.adapter_id), []).append(version)
        for versions in by_adapter.values():
            self._remove_later(tuple(versions))

    async def close(self) -> None:
        """Stop removing; the rest is done after the next start."""
        for task in self._removals:
            task.cancel()
        await asyncio.gather(*self._removals, return_exceptions=True)

    # ------------------------------------------------------------------ uploads

    def check_name(self, name: str) -> str:
        """`name`, if an adapter may be called so. Raises Invalid."""
        if _NAME.fullmatch(name) is None or name in (".", ".."):
            raise Invalid(
                "Invalid value for 'name': use 1 to 64 letters, digits, '.', '_' and '-'.", "invalid_value", "name"
            )
        if name == self._base_model_id:
            raise Invalid("Invalid value for 'name': that is the base model's id.", "invalid_value", "name")
        if _LOOKS_LIKE_AN_ID.fullmatch(name):
            raise Invalid("Invalid value for 'name': names that look like ids are reserved.", "invalid_value", "name")
        return name

    async def upload(
        self,
        tenant: str,
        name: str,
        *,
        archive: Path | None = None,
        files: Mapping[str, Path] | None = None,
        folder: Path | None = None,
    ) -> tuple[Adapter, AdapterVersion]:
        """Make a PEFT folder the newest version of the tenant's adapter `name`: a tar of it, its two files by name, or
        the operator's own, which is copied.

        Raises Invalid, naming the member, field or tensor at fault, NoAdapterFolder, and Unavailable without an engine
        to check it.
        """
        self.check_name(name)
        scratch = self._data.tmp / f"adapter-{secrets.token_hex(16)}"
        try:
            await asyncio.to_thread(scratch.mkdir, mode=0o700)
            try:
                if archive is not None:
                    await asyncio.to_thread(extract_adapter, archive, scratch, self._max_bytes)
                elif folder is not None:
                    await asyncio.to_thread(adapter_folders.copy_in, folder, scratch, self._max_bytes)
                else:
                    await asyncio.to_thread(adapter_folders.gather, files or {}, scratch)
            except ArchiveError as error:
                raise Invalid(str(error), "invalid_adapter", "file" if folder is None else "lora_path") from None
            return await self._take(tenant, name, scratch)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Unavailable("The server's disk is full; nothing was stored.", "storage_full") from None
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    async def _take(self, tenant: str, name: str, folder: Path) -> tuple[Adapter, AdapterVersion]:
        checked = await self._check(folder)
        async with self._changing:
            known = await self._store.adapters.by_name(tenant, name)
            adapter_id = known.id if known is not None else new_id(ADAPTER)
            new = await asyncio.to_thread(
                adapter_folders.move_version, self._data, folder, tenant, adapter_id, checked.digest
            )
            return await self._store.adapters.publish(tenant, name, new, adapter_id=adapter_id)

    async def _check(self, folder: Path) -> AdapterChecked:
        try:
            checked = await self._engine.check_adapter(self._data.relative(folder))
        except EngineUnavailable:
            raise Unavailable(
                "The engine, which checks adapters, is not available; try again in a moment.", "engine_unavailable"
            ) from None
        if checked.error is not None:
            raise Invalid(checked.error, "invalid_adapter", checked.param)
        return checked

    # ------------------------------------------------------------------ what there is

    async def find(self, tenant: str, reference: str) -> Adapter:
        """By id, name or `ft:…` id. Raises NotFound."""
        adapters = self._store.adapters
        for look_up in (adapters.get, adapters.by_name, adapters.by_fine_tuned_model):
            adapter = await look_up(tenant, reference)
            if adapter is not None:
                return adapter
        raise not_found()

    async def pin(self, tenant: str, reference: str, pinned: bool) -> Adapter:
        """Keep an adapter in the engine's memory, or no longer. Raises NotFound, Conflict, Unavailable."""
        adapter = await self.find(tenant, reference)
        changed = await (self._pins.pin(adapter) if pinned else self._pins.unpin(adapter))
        if changed is None:
            raise not_found()
        return changed

    async def download(self, tenant: str, reference: str) -> Download:
        """A tar of the version that `reference` means, as a model id does. Raises NotFound."""
        model = await self._store.models.resolve(tenant, reference)
        if model is None:
            raise not_found()
        try:
            files = await asyncio.to_thread(adapter_folders.open_files, self._data.resolve(model.path))
        except FileNotFoundError:  # deleted or pruned since
            raise not_found() from None
        sizes = [size for _, size in files.values()]
        return Download(f"adapter-{model.digest[:12]}.tar", packed_size(sizes), pack_adapter(files))

    # ------------------------------------------------------------------ deletion

    async def delete(self, tenant: str, reference: str) -> Adapter:
        """New requests no longer find it; running ones finish, then its files go. Raises NotFound, Conflict."""
        adapter = await self.find(tenant, reference)
        newest = await self._store.adapters.newest_version(tenant, adapter.id)
        if newest is not None and newest.job_id is not None and adapter.fine_tuned_model is not None:
            job = await self._store.jobs.get(tenant, newest.job_id)
            if job is not None and job.status not in FINAL:
                raise Conflict(
                    f"The job {job.id} still publishes versions of this adapter; cancel it first.", "adapter_in_use"
                )
        async with self._changing:
            versions = await self._store.adapters.delete(tenant, adapter.id)
        if versions is None:
            raise not_found()
        if versions:
            self._remove_later(versions)
        return adapter

    def _remove_later(self, versions: tuple[AdapterVersion, ...]) -> None:
        task = asyncio.create_task(self._remove(versions), name=f"remove-{versions[0].adapter_id}")
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove(self, versions: tuple[AdapterVersion, ...]) -> None:
        """Wait until nothing uses the versions, then remove their folders; try again until it is done."""
        while True:
            try:
                for version in versions:
                    # The engine knows versions by digest alone; a live twin of another adapter keeps it loaded, and
                    # requests under way may still read this folder only as long as they are under way.
                    await self._engine.drop_adapter(version.digest)
                    await asyncio.to_thread(adapter_folders.remove_version, self._data, version.path)
                await self._store.adapters.files_removed(versions[0].tenant, versions[0].adapter_id)
                return
            except EngineUnavailable:
                await self._engine_back()
            except Exception:
                log.exception("adapter %s could not be removed; trying again", versions[0].adapter_id)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _engine_back(self) -> None:
        try:
            await self._engine.wait_ready(_ENGINE_SECONDS)
        except EngineUnavailable:
            log.debug("deleted adapters still wait for the engine")


def not_found() -> NotFound:
    return NotFound("No such adapter; GET /v1/adapters lists yours.", "adapter_not_found", "adapter_id")
