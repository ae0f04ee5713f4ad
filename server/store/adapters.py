"""Adapters and their immutable versions. A name is unique a tenant; a version is never changed, only deleted."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from coserve.server.store.database import Database
from coserve.server.store.errors import AlreadyExists
from coserve.server.store.ids import ADAPTER, new_id
from coserve.server.store.rows import Page, page


@dataclass(frozen=True, slots=True)
class Adapter:
    id: str
    tenant: str
    name: str
    fine_tuned_model: str | None  # "ft:…" of an adapter that a job trains
    created_at: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A PEFT folder that is whole and on disk at `path`."""

    digest: str  # hex SHA-256
    path: str  # relative to the data directory
    rank: int
    bytes: int
    job_id: str | None = None  # the job and step that made it; None for an upload
    step: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    adapter_id: str
    tenant: str
    number: int  # 1, 2, … in order of publication
    digest: str
    path: str
    rank: int
    bytes: int
    created_at: int
    job_id: str | None
    step: int | None


class Adapters:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def create(
        self, tenant: str, name: str, *, fine_tuned_model: str | None = None, adapter_id: str | None = None
    ) -> Adapter:
        """An adapter without versions, as a job needs before it trains. Raises AlreadyExists for a taken name."""
        created_at = int(self._clock())
        id_ = adapter_id or new_id(ADAPTER)
        return await self._database.write(
            lambda connection: insert_adapter(connection, tenant, id_, name, fine_tuned_model, created_at)
        )

    async def get(self, tenant: str, adapter_id: str) -> Adapter | None:
        return await self._database.read(lambda connection: _find(connection, "id", tenant, adapter_id))

    async def by_name(self, tenant: str, name: str) -> Adapter | None:
        return await self._database.read(lambda connection: _find(connection, "name", tenant, name))

    async def by_fine_tuned_model(self, tenant: str, model: str) -> Adapter | None:
        return await self._database.read(lambda connection: _find(connection, "fine_tuned_model", tenant, model))

    async def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page[Adapter]:
        """Newest first; adapters without a live version are listed too. Raises UnknownCursor."""
        return await self._database.read(
            lambda connection: page(
                connection, "adapters", _adapter, where="tenant = ?", values=(tenant,), shown="deleted = 0",
                after=after, limit=limit,
            )
        )  # fmt: skip

    async def set_pinned(self, tenant: str, adapter_id: str, pinned: bool) -> Adapter | None:
        def update(connection: sqlite3.Connection) -> Adapter | None:
            connection.execute(
                "UPDATE adapters SET pinned = ? WHERE tenant = ? AND id = ? AND deleted = 0",
                (pinned, tenant, adapter_id),
            )
            return _find(connection, "id", tenant, adapter_id)

        return await self._database.write(update)

    async def all_pinned_for_recovery(self) -> tuple[AdapterVersion, ...]:
        """The newest live version of every pinned adapter, of all tenants, the adapters in order of creation."""

        def find(connection: sqlite3.Connection) -> tuple[AdapterVersion, ...]:
            rows = connection.execute("SELECT tenant, id FROM adapters WHERE pinned = 1 AND deleted = 0 ORDER BY seq")
            found = [newest_version(connection, row["tenant"], row["id"]) for row in rows.fetchall()]
            return tuple(version for version in found if version is not None)

        return await self._database.read(find)

    async def add_version(self, tenant: str, adapter_id: str, new: NewVersion) -> AdapterVersion | None:
        """Publish: from the commit on, the adapter's name means this version. None for an unknown adapter.

        The newest version again (same digest) is not a new one: it is returned as it is.
        """
        created_at = int(self._clock())
        return await self._database.write(
            lambda connection: insert_version(connection, tenant, adapter_id, new, created_at)
        )

    async def publish(
        self, tenant: str, name: str, new: NewVersion, *, adapter_id: str | None = None
    ) -> tuple[Adapter, AdapterVersion]:
        """`add_version` to the adapter called `name`, which is made (as `adapter_id`, if given) if it is not there.

        The folder at `new.path` may lie under an adapter id drawn beforehand: look up `by_name` first, and see
        the returned adapter's id, which tells who won if two uploads of a new name raced.
        """
        created_at = int(self._clock())
        fresh_id = adapter_id or new_id(ADAPTER)

        def upsert(connection: sqlite3.Connection) -> tuple[Adapter, AdapterVersion]:
            adapter = _find(connection, "name", tenant, name)
            if adapter is None:
                adapter = insert_adapter(connection, tenant, fresh_id, name, None, created_at)
            version = insert_version(connection, tenant, adapter.id, new, created_at)
            if version is None:
                raise LookupError(f"adapter {adapter.id} is not there after its insert")
            return adapter, version

        return await self._database.write(upsert)

    async def newest_version(self, tenant: str, adapter_id: str) -> AdapterVersion | None:
        return await self._database.read(lambda connection: newest_version(connection, tenant, adapter_id))

    async def versions(self, tenant: str, adapter_id: str) -> tuple[AdapterVersion, ...] | None:
        """Live versions, newest first; None for an unknown adapter."""

        def find(connection: sqlite3.Connection) -> tuple[AdapterVersion, ...] | None:
            if _find(connection, "id", tenant, adapter_id) is None:
                return None
            return _versions(connection, tenant, adapter_id)

        return await self._database.read(find)

    async def delete(self, tenant: str, adapter_id: str) -> tuple[AdapterVersion, ...] | None:
        """Take the adapter and all its versions away, in one commit; its name is free again. None for an unknown one.

        The versions are returned so that the caller can drop them from the engine, remove their folders and then
        call `files_removed`; `all_deleted_versions_for_recovery` names what a crash left behind.
        """

        def update(connection: sqlite3.Connection) -> tuple[AdapterVersion, ...] | None:
            if _find(connection, "id", tenant, adapter_id) is None:
                return None
            gone = _versions(connection, tenant, adapter_id)
            connection.execute("UPDATE adapters SET deleted = 1 WHERE tenant = ? AND id = ?", (tenant, adapter_id))
            connection.execute(
                "UPDATE adapter_versions SET deleted = 1 WHERE tenant = ? AND adapter_id = ?", (tenant, adapter_id)
            )
            return gone

        return await self._database.write(update)

    async def digest_is_live(self, digest: str) -> bool:
        """Whether any live version, of whichever tenant, has this digest: the engine keys what it loads by it."""

        def find(connection: sqlite3.Connection) -> bool:
            row = connection.execute(
                "SELECT 1 FROM adapter_versions WHERE digest = ? AND deleted = 0 "
                "UNION ALL SELECT 1 FROM checkpoints WHERE digest = ? AND pruned = 0 LIMIT 1",
                (digest, digest),
            ).fetchone()
            return row is not None

        return await self._database.read(find)

    async def files_removed(self, tenant: str, adapter_id: str) -> None:
        """Note that the folders of a deleted adapter's versions are gone."""

        def update(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE adapter_versions SET files_gone = 1 WHERE tenant = ? AND adapter_id = ? AND deleted = 1",
                (tenant, adapter_id),
            )

        await self._database.write(update)

    async def all_deleted_versions_for_recovery(self) -> tuple[AdapterVersion, ...]:
        """Deleted versions, of all tenants, whose folders may still be there and are no live version's."""

        def find(connection: sqlite3.Connection) -> tuple[AdapterVersion, ...]:
            rows = connection.execute(
                "SELECT * FROM adapter_versions WHERE deleted = 1 AND files_gone = 0"
                " AND path NOT IN (SELECT path FROM adapter_versions WHERE deleted = 0) ORDER BY seq"
            )
            return tuple(version_of(row) for row in rows)

        return await self._database.read(find)

    async def all_versions_for_recovery(self) -> tuple[AdapterVersion, ...]:
        """Live versions of all tenants: any other folder under adapters/ may be removed at start."""

        def find(connection: sqlite3.Connection) -> tuple[AdapterVersion, ...]:
            rows = connection.execute("SELECT * FROM adapter_versions WHERE deleted = 0 ORDER BY seq")
            return tuple(version_of(row) for row in rows)

        return await self._database.read(find)


def insert_adapter(
    connection: sqlite3.Connection, tenant: str, id_: str, name: str, fine_tuned_model: str | None, created_at: int
) -> Adapter:
    """Add an adapter inside the caller's transaction. Raises AlreadyExists for a taken name."""
    taken = connection.execute(
        "SELECT 1 FROM adapters WHERE tenant = ? AND deleted = 0 AND (name = ? OR fine_tuned_model = ?)",
        (tenant, name, fine_tuned_model),
    ).fetchone()
    if taken:
        raise AlreadyExists(f"An adapter named {name!r} exists already; choose another name, or delete that one first.")
    connection.execute(
        "INSERT INTO adapters (id, tenant, name, fine_tuned_model, created_at) VALUES (?, ?, ?, ?, ?)",
        (id_, tenant, name, fine_tuned_model, created_at),
    )
    return Adapter(id_, tenant, name, fine_tuned_model, created_at, pinned=False)


def ensure_adapter(
    connection: sqlite3.Connection, tenant: str, id_: str, name: str, fine_tuned_model: str | None, created_at: int
) -> None:
    """Make the adapter `id_` of a job, inside the caller's transaction, unless it is there.

    One that was deleted while its job went on comes back; where its name was taken meanwhile, it is called by its id.
    """
    if _find(connection, "id", tenant, id_) is not None:
        return
    if _find(connection, "name", tenant, name) is not None:
        name = id_
    deleted = connection.execute(
        "UPDATE adapters SET deleted = 0, name = ? WHERE tenant = ? AND id = ?", (name, tenant, id_)
    )
    if deleted.rowcount == 0:
        insert_adapter(connection, tenant, id_, name, fine_tuned_model, created_at)


def insert_version(
    connection: sqlite3.Connection, tenant: str, adapter_id: str, new: NewVersion, created_at: int
) -> AdapterVersion | None:
    """Add a version inside the caller's transaction; None for an unknown adapter, see `Adapters.add_version`."""
    if _find(connection, "id", tenant, adapter_id) is None:
        return None
    newest = newest_version(connection, tenant, adapter_id)
    if newest is not None and newest.digest == new.digest:
        return newest
    number = connection.execute(
        "SELECT COALESCE(MAX(number), 0) + 1 FROM adapter_versions WHERE adapter_id = ?", (adapter_id,)
    ).fetchone()[0]
    connection.execute(
        "INSERT INTO adapter_versions (adapter_id, tenant, number, digest, path, rank, bytes, created_at, job_id, step)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (adapter_id, tenant, number, new.digest, new.path, new.rank, new.bytes, created_at, new.job_id, new.step),
    )
    return newest_version(connection, tenant, adapter_id)


def newest_version(connection: sqlite3.Connection, tenant: str, adapter_id: str) -> AdapterVersion | None:
    row = connection.execute(
        "SELECT * FROM adapter_versions WHERE tenant = ? AND adapter_id = ? AND deleted = 0 "
        "ORDER BY number DESC LIMIT 1",
        (tenant, adapter_id),
    ).fetchone()
    return version_of(row) if row else None


def version_of(row: sqlite3.Row) -> AdapterVersion:
    return AdapterVersion(
        row["adapter_id"], row["tenant"], row["number"], row["digest"], row["path"], row["rank"], row["bytes"],
        row["created_at"], row["job_id"], row["step"],
    )  # fmt: skip


def _versions(connection: sqlite3.Connection, tenant: str, adapter_id: str) -> tuple[AdapterVersion, ...]:
    rows = connection.execute(
        "SELECT * FROM adapter_versions WHERE tenant = ? AND adapter_id = ? AND deleted = 0 ORDER BY number DESC",
        (tenant, adapter_id),
    )
    return tuple(version_of(row) for row in rows)


def _find(connection: sqlite3.Connection, column: str, tenant: str, value: str) -> Adapter | None:
    row = connection.execute(
        f"SELECT * FROM adapters WHERE tenant = ? AND {column} = ? AND deleted = 0", (tenant, value)
    ).fetchone()
    return _adapter(row) if row else None


def _adapter(row: sqlite3.Row) -> Adapter:
    return Adapter(
        row["id"], row["tenant"], row["name"], row["fine_tuned_model"], row["created_at"], bool(row["pinned"])
    )
