"""The usage ledger: one row a request, written while it runs and raised to what it came to; nothing counts twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from coserve.server.store.database import Database


@dataclass(frozen=True, slots=True)
class Usage:
    request_id: str
    model: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt tokens, those whose K/V was there already
    computed_tokens: int  # prompt tokens that were run, for all choices together
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class UsageTotals:
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageLedger:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def record(self, tenant: str, usage: Usage) -> bool:
        """Write the row of a request, or raise it; False, and nothing changes, if it has one that says as much."""
        created_at = int(self._clock())

        def insert(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "INSERT INTO usage_ledger (request_id, tenant, model, prompt_tokens, cached_tokens, computed_tokens,"
                " completion_tokens, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (request_id) DO UPDATE SET"
                " cached_tokens = excluded.cached_tokens, computed_tokens = excluded.computed_tokens, "
                "completion_tokens = excluded.completion_tokens "
                "WHERE excluded.completion_tokens > completion_tokens AND excluded.tenant = tenant",
                (usage.request_id, tenant, usage.model, usage.prompt_tokens, usage.cached_tokens,
                 usage.computed_tokens, usage.completion_tokens, created_at),
            )  # fmt: skip
            return changed.rowcount == 1

        return await self._database.write(insert)

    async def get(self, tenant: str, request_id: str) -> Usage | None:
        def find(connection: sqlite3.Connection) -> Usage | None:
            row = connection.execute(
                "SELECT * FROM usage_ledger WHERE tenant = ? AND request_id = ?", (tenant, request_id)
            ).fetchone()
            if row is None:
                return None
            return Usage(
                row["request_id"],
                row["model"],
                row["prompt_tokens"],
                row["cached_tokens"],
                row["computed_tokens"],
                row["completion_tokens"],
            )

        return await self._database.read(find)

    async def totals(self, tenant: str, *, since: int = 0, until: int | None = None) -> UsageTotals:
        """Sums over rows written in [since, until), Unix seconds."""

        def total(connection: sqlite3.Connection) -> UsageTotals:
            row = connection.execute(
                "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(cached_tokens), 0), "
                "COALESCE(SUM(completion_tokens), 0) FROM usage_ledger "
                "WHERE tenant = ? AND created_at >= ? AND (? IS NULL OR created_at < ?)",
                (tenant, since, until, until),
            ).fetchone()
            return UsageTotals(*row)

        return await self._database.read(total)
