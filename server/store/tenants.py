"""Tenants: the owners of everything else. Ids are used as folder names, so they never hold more than [A-Za-z0-9-]."""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field

from coserve.server.store.database import Database
from coserve.server.store.errors import AlreadyExists
from coserve.server.store.ids import TENANT, new_id
from coserve.server.store.rows import Page, page

DEFAULT_TENANT = "default"  # id and name of the tenant that the admin key acts as
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    name: str
    created_at: int
    salt_secret: bytes = field(repr=False)  # 32 random bytes, made with the tenant; never leaves the server


class Tenants:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def create(self, name: str) -> Tenant:
        """A new tenant. Raises ValueError for a bad name, AlreadyExists for a taken one."""
        if NAME.fullmatch(name) is None:
            raise ValueError(
                f"tenant name {name!r}: use 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit"
            )
        created_at = int(self._clock())

        def insert(connection: sqlite3.Connection) -> Tenant:
            if connection.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"Tenant {name!r} exists already.")
            return _insert(connection, new_id(TENANT), name, created_at)

        return await self._database.write(insert)

    async def ensure_default(self) -> Tenant:
        """The tenant `default`, made on the first call."""
        created_at = int(self._clock())

        def ensure(connection: sqlite3.Connection) -> Tenant:
            row = connection.execute("SELECT * FROM tenants WHERE id = ?", (DEFAULT_TENANT,)).fetchone()
            return _tenant(row) if row else _insert(connection, DEFAULT_TENANT, DEFAULT_TENANT, created_at)

        return await self._database.write(ensure)

    async def get(self, tenant: str) -> Tenant | None:
        return await self._one("id", tenant)

    async def by_name(self, name: str) -> Tenant | None:
        return await self._one("name", name)

    async def list_for_admin(self, *, after: str | None = None, limit: int = 20) -> Page[Tenant]:
        return await self._database.read(
            lambda connection: page(connection, "tenants", _tenant, where="1", values=(), after=after, limit=limit)
        )

    async def _one(self, column: str, value: str) -> Tenant | None:
        def find(connection: sqlite3.Connection) -> Tenant | None:
            row = connection.execute(f"SELECT * FROM tenants WHERE {column} = ?", (value,)).fetchone()
            return _tenant(row) if row else None

        return await self._database.read(find)


def _insert(connection: sqlite3.Connection, id_: str, name: str, created_at: int) -> Tenant:
    tenant = Tenant(id_, name, created_at, secrets.token_bytes(32))
    connection.execute(
        "INSERT INTO tenants (id, name, salt_secret, created_at) VALUES (?, ?, ?, ?)",
        (tenant.id, tenant.name, tenant.salt_secret, tenant.created_at),
    )
    return tenant


def _tenant(row: sqlite3.Row) -> Tenant:
    return Tenant(row["id"], row["name"], row["created_at"], row["salt_secret"])
