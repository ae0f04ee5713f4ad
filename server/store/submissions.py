"""Which job a create request made, so that the same request sent twice makes one job.

A client that sets `Idempotency-Key` is taken at its word. The official client sends none, only a retry count: then
the same API key with the same body within ten minutes is the same request.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from coserve.server.store.errors import IdempotencyConflict

RETRY_WINDOW_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Submission:
    body_hash: str  # hex SHA-256 of the request body
    key_id: str  # the API key that sent it
    key: str | None = None  # its Idempotency-Key
    is_retry: bool = False  # the client says that it has sent this before


def find_submission(connection: sqlite3.Connection, tenant: str, submission: Submission, now: int) -> str | None:
    """The job of the earlier, equal submission. Raises IdempotencyConflict for the same key with another body."""
    if submission.key is not None:
        row = connection.execute(
            "SELECT body_hash, job_id FROM submissions WHERE tenant = ? AND key = ?", (tenant, submission.key)
        ).fetchone()
        if row is None:
            return None
        if row["body_hash"] != submission.body_hash:
            raise IdempotencyConflict(submission.key)
        return row["job_id"]
    if not submission.is_retry:
        return None
    row = connection.execute(
        "SELECT job_id FROM submissions WHERE tenant = ? AND key_id = ? AND body_hash = ? AND key IS NULL"
        " AND created_at >= ? ORDER BY seq DESC LIMIT 1",
        (tenant, submission.key_id, submission.body_hash, now - RETRY_WINDOW_SECONDS),
    ).fetchone()
    return row["job_id"] if row else None


def insert_submission(
    connection: sqlite3.Connection, tenant: str, submission: Submission, job_id: str, now: int
) -> None:
    """Note that `submission` made `job_id`, inside the transaction that makes the job."""
    connection.execute(
        "INSERT INTO submissions (tenant, key, key_id, body_hash, job_id, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (tenant, submission.key, submission.key_id, submission.body_hash, job_id, now),
    )
