"""From the model string of a tenant's request to the one adapter version that answers it."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass

from coserve.server.store.adapters import newest_version, version_of
from coserve.server.store.database import Database
from coserve.server.store.permissions import granting_tenant

_AT_DIGEST = re.compile(r"(?P<name>.+)@(?P<digest>[0-9a-f]{12})")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A version, fixed at the moment of the look-up."""

    tenant: str  # whose it is
    digest: str
    path: str  # PEFT folder, relative to the data directory
    adapter_id: str | None  # None for a job's checkpoint
    model_id: str  # the model string that was asked for
    job_id: str | None  # the job that trained it


class Models:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def resolve(self, tenant: str, model: str, *, project: str | None = None) -> ResolvedModel | None:
        """An adapter's name, id or `ft:…` (its newest version), `…:ckpt-step-N`, or any of the former `@<digest12>`.

        None if the tenant has no such model, whether or not another tenant has. With `project`, the tenant's public
        name, also a model that its owner lets that project ask. The base model is not known here.
        """

        def find(connection: sqlite3.Connection) -> ResolvedModel | None:
            found = _resolve(connection, tenant, model)
            if found is None and project is not None:
                owner = granting_tenant(connection, project, model)
                found = _resolve(connection, owner, model) if owner is not None else None
            return found

        return await self._database.read(find)


def _resolve(connection: sqlite3.Connection, tenant: str, model: str) -> ResolvedModel | None:
    adapter_id = _adapter_id(connection, tenant, model)
    if adapter_id is not None:
        version = newest_version(connection, tenant, adapter_id)
        if version is None:
            return None
        return ResolvedModel(tenant, version.digest, version.path, adapter_id, model, version.job_id)
    checkpoint = connection.execute(
        "SELECT * FROM checkpoints WHERE tenant = ? AND model_id = ? AND pruned = 0 ORDER BY seq DESC LIMIT 1",
        (tenant, model),
    ).fetchone()
    if checkpoint is not None:
        return ResolvedModel(tenant, checkpoint["digest"], checkpoint["path"], None, model, checkpoint["job_id"])
    at_digest = _AT_DIGEST.fullmatch(model)
    if at_digest is None:
        return None
    adapter_id = _adapter_id(connection, tenant, at_digest["name"])
    if adapter_id is None:
        return None
    row = connection.execute(
        "SELECT * FROM adapter_versions WHERE tenant = ? AND adapter_id = ? AND substr(digest, 1, 12) = ? "
        "AND deleted = 0 ORDER BY number DESC LIMIT 1",
        (tenant, adapter_id, at_digest["digest"]),
    ).fetchone()
    if row is None:
        return None
    version = version_of(row)
    return ResolvedModel(tenant, version.digest, version.path, adapter_id, model, version.job_id)


def _adapter_id(connection: sqlite3.Connection, tenant: str, model: str) -> str | None:
    # An id wins over a name that looks like it: names are chosen by people, ids are not.
    row = connection.execute(
        "SELECT id FROM adapters WHERE tenant = ? AND deleted = 0 AND (id = ? OR name = ? OR fine_tuned_model = ?) "
        "ORDER BY id = ? DESC LIMIT 1",
        (tenant, model, model, model, model),
    ).fetchone()
    return row["id"] if row else None
