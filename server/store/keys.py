"""API keys. Only the SHA-256 of a key is stored; the key itself is shown once, when it is made."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from coserve.server.store.database import Database
from coserve.server.store.ids import KEY, new_id, new_secret_key
from coserve.server.store.rows import Page, page


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    tenant: str
    name: str | None
    redacted: str  # "sk-cs-…abcd": enough to tell keys apart
    created_at: int
    revoked: bool


def hash_key(secret: str) -> bytes:
    """What is stored of a key (32 bytes). Keys carry 262 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


class ApiKeys:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def create(self, tenant: str, name: str | None = None) -> tuple[ApiKey, str]:
        """A new key and its secret text, which cannot be had again."""
        secret = new_secret_key()
        key = ApiKey(new_id(KEY), tenant, name, f"{secret[:6]}…{secret[-4:]}", int(self._clock()), revoked=False)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO api_keys (id, tenant, name, hash, redacted, created_at) VALUES (?, ?, ?, ?, ?, ?)",
                (key.id, key.tenant, key.name, hash_key(secret), key.redacted, key.created_at),
            )

        await self._database.write(insert)
        return key, secret

    async def authenticate(self, secret: str) -> ApiKey | None:
        """The live key whose text is `secret`."""
        wanted = hash_key(secret)

        def find(connection: sqlite3.Connection) -> ApiKey | None:
            row = connection.execute("SELECT * FROM api_keys WHERE hash = ? AND revoked = 0", (wanted,)).fetchone()
            return _key(row) if row is not None and hmac.compare_digest(row["hash"], wanted) else None

        return await self._database.read(find)

    async def get(self, tenant: str, key_id: str) -> ApiKey | None:
        def find(connection: sqlite3.Connection) -> ApiKey | None:
            row = connection.execute(
                "SELECT * FROM api_keys WHERE tenant = ? AND id = ? AND revoked = 0", (tenant, key_id)
            ).fetchone()
            return _key(row) if row else None

        return await self._database.read(find)

    async def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page[ApiKey]:
        return await self._list("tenant = ?", (tenant,), after, limit)

    async def list_for_admin(self, *, after: str | None = None, limit: int = 20) -> Page[ApiKey]:
        """Keys of all tenants: for the admin routes only."""
        return await self._list("1", (), after, limit)

    async def revoke(self, tenant: str, key_id: str) -> bool:
        """True if the tenant had this live key; from now on it authenticates nobody."""
        return await self._revoke("tenant = ? AND id = ?", (tenant, key_id))

    async def revoke_for_admin(self, key_id: str) -> bool:
        """The same for a key of any tenant: for the admin routes only."""
        return await self._revoke("id = ?", (key_id,))

    async def _list(self, where: str, values: tuple[str, ...], after: str | None, limit: int) -> Page[ApiKey]:
        return await self._database.read(
            lambda connection: page(
                connection, "api_keys", _key, where=where, values=values, shown="revoked = 0", after=after, limit=limit
            )
        )

    async def _revoke(self, where: str, values: tuple[str, ...]) -> bool:
        def update(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(f"UPDATE api_keys SET revoked = 1 WHERE {where} AND revoked = 0", values)
            return changed.rowcount == 1

        return await self._database.write(update)


def _key(row: sqlite3.Row) -> ApiKey:
    return ApiKey(row["id"], row["tenant"], row["name"], row["redacted"], row["created_at"], bool(row["revoked"]))
