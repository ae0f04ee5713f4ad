"""Rows of a job's checkpoints. A pruned checkpoint is not there any more, for anybody."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coserve.server.store.database import Database
from coserve.server.store.ids import CHECKPOINT, new_id
from coserve.server.store.rows import Page, dump, load, page


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A checkpoint folder that is whole and on disk at `path`."""

    step: int
    model_id: str  # "ft:…:ckpt-step-N"
    digest: str
    path: str  # relative to the data directory
    metrics: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = True  # its optimizer state is still there
    created_at: int | None = None  # None: the time of the commit that it is part of


@dataclass(frozen=True, slots=True)
class Checkpoint:
    id: str
    job_id: str
    step: int
    model_id: str
    digest: str
    path: str
    metrics: dict[str, Any]
    created_at: int
    resumable: bool


class Checkpoints:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(
        self, tenant: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[Checkpoint] | None:
        """Newest first; None for an unknown job. Raises UnknownCursor."""

        def find(connection: sqlite3.Connection) -> Page[Checkpoint] | None:
            known = connection.execute("SELECT 1 FROM jobs WHERE tenant = ? AND id = ?", (tenant, job_id)).fetchone()
            if known is None:
                return None
            return page(
                connection, "checkpoints", _checkpoint, where="tenant = ? AND job_id = ?", values=(tenant, job_id),
                shown="pruned = 0", after=after, limit=limit,
            )  # fmt: skip

        return await self._database.read(find)

    async def all_of_tenant(self, tenant: str) -> tuple[Checkpoint, ...]:
        """Every checkpoint that answers requests now, oldest first: they are models of the tenant."""

        def find(connection: sqlite3.Connection) -> tuple[Checkpoint, ...]:
            rows = connection.execute(
                "SELECT * FROM checkpoints WHERE tenant = ? AND pruned = 0 ORDER BY seq", (tenant,)
            )
            return tuple(_checkpoint(row) for row in rows)

        return await self._database.read(find)


def insert_checkpoint(
    connection: sqlite3.Connection, tenant: str, job_id: str, new: NewCheckpoint, now: int
) -> Checkpoint:
    """Add a checkpoint inside the caller's transaction; one of the same step is replaced and keeps its id.

    A job that goes on from an earlier checkpoint writes the same steps again.
    """
    row = connection.execute(
        "SELECT id FROM checkpoints WHERE tenant = ? AND job_id = ? AND step = ? AND pruned = 0",
        (tenant, job_id, new.step),
    ).fetchone()
    id_ = row["id"] if row else new_id(CHECKPOINT)
    created_at = now if new.created_at is None else new.created_at
    connection.execute(
        "INSERT INTO checkpoints (id, tenant, job_id, step, model_id, digest, path, metrics, created_at, resumable)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET model_id = excluded.model_id,"
        " digest = excluded.digest, path = excluded.path, metrics = excluded.metrics,"
        " created_at = excluded.created_at, resumable = excluded.resumable",
        (id_, tenant, job_id, new.step, new.model_id, new.digest, new.path, dump(dict(new.metrics)), created_at,
         new.resumable),
    )  # fmt: skip
    return Checkpoint(
        id_, job_id, new.step, new.model_id, new.digest, new.path, dict(new.metrics), created_at, new.resumable
    )


def prune_checkpoint(connection: sqlite3.Connection, tenant: str, job_id: str, step: int) -> None:
    """Take the checkpoint of `step` away inside the caller's transaction, if it is there."""
    connection.execute(
        "UPDATE checkpoints SET pruned = 1 WHERE tenant = ? AND job_id = ? AND step = ?", (tenant, job_id, step)
    )


def _checkpoint(row: sqlite3.Row) -> Checkpoint:
    return Checkpoint(
        row["id"], row["job_id"], row["step"], row["model_id"], row["digest"], row["path"], load(row["metrics"]),
        row["created_at"], bool(row["resumable"]),
    )  # fmt: skip
