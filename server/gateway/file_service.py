"""The bytes of tenants' files: into the data directory whole or not at all, and out of it again.

A row in the database is made only for bytes that are synced under their final name; bytes without a row are removed
at the next start.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

from coserve.server.store.atomic import atomic_file, sync_folder
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.files import File, NewFile
from coserve.server.store.ids import FILE, new_id
from coserve.server.store.store import Store


class FileService:
    def __init__(self, store: Store, data: DataDirectory) -> None:
        self._store = store
        self._data = data

    def path(self, file: File) -> Path:
        return self._data.file(file.tenant, file.id)

    async def keep(self, tenant: str, upload: Path, new: NewFile) -> File:
        """Make the synced file `upload`, which lies in the data directory, a file of the tenant. Moves it."""
        file_id = new_id(FILE)
        path = self._data.file(tenant, file_id)
        await asyncio.to_thread(_move, upload, path)
        try:
            return await self._store.files.create(tenant, new, file_id=file_id)
        except Exception:
            await asyncio.to_thread(path.unlink)
            raise

    async def delete(self, tenant: str, file_id: str) -> bool:
        """True if the tenant had the file; it is gone for everybody at once, readers that have it open finish."""
        if not await self._store.files.delete(tenant, file_id):
            return False
        await asyncio.to_thread(self._data.file(tenant, file_id).unlink, missing_ok=True)
        return True

    def copy_in(self, tenant: str, source: Path, filename: str, purpose: str) -> tuple[str, NewFile]:
        """Store a copy of `source` under a new id, for the caller to make its row. Blocks."""
        file_id = new_id(FILE)
        path = self._data.file(tenant, file_id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with source.open("rb") as stream, atomic_file(path) as target:
            shutil.copyfileobj(stream, target)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return file_id, NewFile(path.stat().st_size, filename, purpose, digest)

    def discard(self, tenant: str, file_id: str) -> None:
        """Remove bytes for which no row was made. Blocks."""
        self._data.file(tenant, file_id).unlink(missing_ok=True)

    async def remove_orphans(self) -> None:
        """Remove bytes that no row names, and unfinished uploads. Call at the start, before anything is uploaded."""
        known = await self._store.files.all_ids_for_recovery()
        await asyncio.to_thread(self._remove_all_but, known)

    def _remove_all_but(self, known: frozenset[tuple[str, str]]) -> None:
        self._data.clean_tmp()
        for folder in (self._data.root / "files").iterdir():
            for path in folder.iterdir():
                if (folder.name, path.name) not in known:
                    path.unlink()


def _move(upload: Path, path: Path) -> None:
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(path.parent.parent)
    os.rename(upload, path)
    sync_folder(path.parent)
