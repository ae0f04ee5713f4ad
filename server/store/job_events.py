"""The events of a job that its tenant reads, in the order in which they were written."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.server.store.database import Database
from coserve.server.store.ids import EVENT, new_id
from coserve.server.store.rows import Page, dump, load, page


@dataclass(frozen=True, slots=True)
class NewEvent:
    message: str
    level: str = "info"  # "info" | "warn" | "error"
    type: str = "message"  # "message" | "metrics"
    data: Mapping[str, Any] | None = None
    created_at: int | None = None  # None: the time of the commit that it is part of


@dataclass(frozen=True, slots=True)
class Event:
    id: str
    job_id: str
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None
    position: int  # grows with every event; `since` goes on from it


class JobEvents:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self, tenant: str, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[Event] | None:
        """Newest first; None for an unknown job. Raises UnknownCursor."""

        def find(connection: sqlite3.Connection) -> Page[Event] | None:
            if not _has_job(connection, tenant, job_id):
                return None
            return page(
                connection, "job_events", _event, where="tenant = ? AND job_id = ?", values=(tenant, job_id),
                after=after, limit=limit,
            )  # fmt: skip

        return await self._database.read(find)

    async def since(
        self, tenant: str, job_id: str, position: int = 0, *, limit: int = 1000
    ) -> tuple[Event, ...] | None:
        """Oldest first, after `position` (0: from the beginning), as a live stream needs; None for an unknown job."""

        def find(connection: sqlite3.Connection) -> tuple[Event, ...] | None:
            if not _has_job(connection, tenant, job_id):
                return None
            rows = connection.execute(
                "SELECT * FROM job_events WHERE tenant = ? AND job_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                (tenant, job_id, position, limit),
            )
            return tuple(_event(row) for row in rows)

        return await self._database.read(find)


def insert_events(
    connection: sqlite3.Connection, tenant: str, job_id: str, events: Sequence[NewEvent], now: int
) -> None:
    """Add events inside the caller's transaction."""
    connection.executemany(
        "INSERT INTO job_events (id, tenant, job_id, created_at, level, message, type, data)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (new_id(EVENT), tenant, job_id, now if event.created_at is None else event.created_at, event.level,
             event.message, event.type, dump(event.data))
            for event in events
        ],
    )  # fmt: skip


def _has_job(connection: sqlite3.Connection, tenant: str, job_id: str) -> bool:
    row = connection.execute("SELECT 1 FROM jobs WHERE tenant = ? AND id = ?", (tenant, job_id)).fetchone()
    return row is not None


def _event(row: sqlite3.Row) -> Event:
    return Event(
        row["id"], row["job_id"], row["created_at"], row["level"], row["message"], row["type"], load(row["data"]),
        row["seq"],
    )  # fmt: skip
