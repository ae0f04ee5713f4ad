"""Rows of uploaded and produced files. The bytes lie in the data directory; a row is made once they are whole there."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from coserve.server.store.database import Database
from coserve.server.store.ids import FILE, new_id
from coserve.server.store.rows import Page, page


@dataclass(frozen=True, slots=True)
class NewFile:
    """What the caller knows of a file whose bytes are in place."""

    bytes: int
    filename: str
    purpose: str
    sha256: str  # hex
    status: str = "processed"  # "uploaded" | "processed" | "error"
    status_details: str | None = None


@dataclass(frozen=True, slots=True)
class File:
    id: str
    tenant: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None
    sha256: str


class Files:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def create(self, tenant: str, new: NewFile, *, file_id: str | None = None) -> File:
        """Add the row; `file_id` where the bytes were stored under an id drawn before."""
        id_, created_at = file_id or new_id(FILE), int(self._clock())
        return await self._database.write(lambda connection: insert_file(connection, tenant, id_, new, created_at))

    async def get(self, tenant: str, file_id: str) -> File | None:
        def find(connection: sqlite3.Connection) -> File | None:
            row = connection.execute(
                "SELECT * FROM files WHERE tenant = ? AND id = ? AND deleted = 0", (tenant, file_id)
            ).fetchone()
            return _file(row) if row else None

        return await self._database.read(find)

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20, purpose: str | None = None,
        ascending: bool = False,
    ) -> Page[File]:  # fmt: skip
        """Newest first (or oldest first). `after` may name a file deleted since. Raises UnknownCursor."""
        where, values = "tenant = ?", [tenant]
        if purpose is not None:
            where, values = "tenant = ? AND purpose = ?", [tenant, purpose]
        return await self._database.read(
            lambda connection: page(
                connection, "files", _file, where=where, values=values, shown="deleted = 0", after=after, limit=limit,
                ascending=ascending,
            )
        )  # fmt: skip

    async def set_status(self, tenant: str, file_id: str, status: str, details: str | None = None) -> bool:
        def update(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE files SET status = ?, status_details = ? WHERE tenant = ? AND id = ? AND deleted = 0",
                (status, details, tenant, file_id),
            )
            return changed.rowcount == 1

        return await self._database.write(update)

    async def delete(self, tenant: str, file_id: str) -> bool:
        """True if the tenant had the file. The caller removes the bytes afterwards."""

        def update(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE files SET deleted = 1 WHERE tenant = ? AND id = ? AND deleted = 0", (tenant, file_id)
            )
            return changed.rowcount == 1

        return await self._database.write(update)

    async def all_ids_for_recovery(self) -> frozenset[tuple[str, str]]:
        """(tenant, file id) of every live file: bytes of any other may be removed at start."""

        def find(connection: sqlite3.Connection) -> frozenset[tuple[str, str]]:
            rows = connection.execute("SELECT tenant, id FROM files WHERE deleted = 0")
            return frozenset((row["tenant"], row["id"]) for row in rows)

        return await self._database.read(find)


def insert_file(connection: sqlite3.Connection, tenant: str, file_id: str, new: NewFile, created_at: int) -> File:
    """Add a file row inside the caller's transaction."""
    connection.execute(
        "INSERT INTO files (id, tenant, bytes, created_at, filename, purpose, status, status_details, sha256) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (file_id, tenant, new.bytes, created_at, new.filename, new.purpose, new.status, new.status_details, new.sha256),
    )
    return File(
        file_id, tenant, new.bytes, created_at, new.filename, new.purpose, new.status, new.status_details, new.sha256
    )


def _file(row: sqlite3.Row) -> File:
    return File(
        row["id"], row["tenant"], row["bytes"], row["created_at"], row["filename"], row["purpose"], row["status"],
        row["status_details"], row["sha256"],
    )  # fmt: skip
