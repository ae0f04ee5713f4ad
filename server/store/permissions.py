"""Who else may ask a finetuned model or a checkpoint: grants that its owner makes, one a model and project.

A project is a tenant by its public name, whether or not there is one yet: a grant tells nobody which names exist.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coserve.server.store.database import Database
from coserve.server.store.ids import PERMISSION, new_id
from coserve.server.store.rows import Page, page


@dataclass(frozen=True, slots=True)
class Permission:
    id: str
    model_id: str  # "ft:…" or "ft:…:ckpt-step-N"
    project: str
    created_at: int


class Permissions:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def grant(self, tenant: str, model_id: str, projects: Sequence[str]) -> tuple[Permission, ...] | None:
        """Let each project ask the tenant's model; one that may already keeps its grant. None: no such model."""
        created_at = int(self._clock())

        def insert(connection: sqlite3.Connection) -> tuple[Permission, ...] | None:
            if not _owns(connection, tenant, model_id):
                return None
            for project in dict.fromkeys(projects):
                connection.execute(
                    "INSERT INTO checkpoint_permissions (id, tenant, model_id, project, created_at)"
                    " VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    (new_id(PERMISSION), tenant, model_id, project, created_at),
                )
            rows = connection.execute(
                "SELECT * FROM checkpoint_permissions WHERE tenant = ? AND model_id = ? AND revoked = 0",
                (tenant, model_id),
            )
            granted = {row["project"]: _permission(row) for row in rows}
            return tuple(granted[project] for project in dict.fromkeys(projects))

        return await self._database.write(insert)

    async def list(
        self,
        tenant: str,
        model_id: str,
        *,
        project: str | None = None,
        after: str | None = None,
        limit: int = 10,
        ascending: bool = False,
    ) -> Page[Permission] | None:
        """Newest first unless `ascending`; None if the tenant has no such model. Raises UnknownCursor."""

        def find(connection: sqlite3.Connection) -> Page[Permission] | None:
            if not _owns(connection, tenant, model_id):
                return None
            where, values = "tenant = ? AND model_id = ?", [tenant, model_id]
            if project is not None:
                where, values = f"{where} AND project = ?", [*values, project]
            return page(
                connection, "checkpoint_permissions", _permission, where=where, values=values, shown="revoked = 0",
                after=after, limit=limit, ascending=ascending,
            )  # fmt: skip

        return await self._database.read(find)

    async def revoke(self, tenant: str, permission_id: str, model_id: str) -> bool:
        """From the commit on the project no longer finds the model; what it runs there ends well."""

        def update(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "UPDATE checkpoint_permissions SET revoked = 1"
                " WHERE tenant = ? AND id = ? AND model_id = ? AND revoked = 0",
                (tenant, permission_id, model_id),
            )
            return found.rowcount == 1

        return await self._database.write(update)


def granting_tenant(connection: sqlite3.Connection, project: str, model_id: str) -> str | None:
    """The owner who lets `project` ask `model_id`."""
    row = connection.execute(
        "SELECT tenant FROM checkpoint_permissions WHERE project = ? AND model_id = ? AND revoked = 0 LIMIT 1",
        (project, model_id),
    ).fetchone()
    return row["tenant"] if row else None


def _owns(connection: sqlite3.Connection, tenant: str, model_id: str) -> bool:
    row = connection.execute(
        "SELECT 1 FROM adapters JOIN adapter_versions ON adapter_id = adapters.id"
        " WHERE adapters.tenant = ? AND fine_tuned_model = ? AND adapters.deleted = 0 AND adapter_versions.deleted = 0"
        " UNION ALL SELECT 1 FROM checkpoints WHERE tenant = ? AND model_id = ? AND pruned = 0 LIMIT 1",
        (tenant, model_id, tenant, model_id),
    ).fetchone()
    return row is not None


def _permission(row: sqlite3.Row) -> Permission:
    return Permission(row["id"], row["model_id"], row["project"], row["created_at"])
