"""The tables, as a list of migrations; the database's `user_version` counts those that have run.

Every table that holds a tenant's things has a `tenant` column. `seq` columns order lists: clocks jump, row ids do not.
"""

from __future__ import annotations

import sqlite3

from coserve.server.store.errors import StoreUnavailable

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE tenants (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL UNIQUE,
        salt_secret BLOB NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE TABLE api_keys (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL REFERENCES tenants(id),
        name TEXT,
        hash BLOB NOT NULL UNIQUE,
        redacted TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX api_keys_of_tenant ON api_keys(tenant, seq);
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL REFERENCES tenants(id),
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        status TEXT NOT NULL,
        status_details TEXT,
        sha256 TEXT NOT NULL,
        deleted INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX files_of_tenant ON files(tenant, seq);
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL REFERENCES tenants(id),
        created_at INTEGER NOT NULL,
        status TEXT NOT NULL,
        model TEXT NOT NULL,
        training_file TEXT NOT NULL,
        validation_file TEXT,
        seed INTEGER NOT NULL,
        suffix TEXT,
        metadata TEXT,
        method TEXT NOT NULL,
        hyperparameters TEXT NOT NULL,
        adapter TEXT NOT NULL,
        training TEXT NOT NULL,
        spec TEXT,
        adapter_id TEXT,
        fine_tuned_model TEXT,
        result_files TEXT NOT NULL DEFAULT '[]',
        trained_tokens INTEGER,
        error TEXT,
        finished_at INTEGER,
        estimated_finish INTEGER,
        progress TEXT NOT NULL DEFAULT '{}',
        requested TEXT,
        last_seq INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX jobs_of_tenant ON jobs(tenant, seq);
    CREATE INDEX jobs_by_status ON jobs(status, seq);
    CREATE TABLE job_events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs(id),
        created_at INTEGER NOT NULL,
        level TEXT NOT NULL,
        message TEXT NOT NULL,
        type TEXT NOT NULL,
        data TEXT
    );
    CREATE INDEX events_of_job ON job_events(tenant, job_id, seq);
    CREATE TABLE checkpoints (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs(id),
        step INTEGER NOT NULL,
        model_id TEXT NOT NULL,
        digest TEXT NOT NULL,
        path TEXT NOT NULL,
        metrics TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        resumable INTEGER NOT NULL,
        pruned INTEGER NOT NULL DEFAULT 0
    );
    CREATE UNIQUE INDEX checkpoint_of_step ON checkpoints(job_id, step) WHERE pruned = 0;
    CREATE INDEX checkpoints_of_job ON checkpoints(tenant, job_id, seq);
    CREATE INDEX checkpoints_by_model ON checkpoints(tenant, model_id);
    CREATE TABLE adapters (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL REFERENCES tenants(id),
        name TEXT NOT NULL,
        fine_tuned_model TEXT,
        created_at INTEGER NOT NULL,
        pinned INTEGER NOT NULL DEFAULT 0,
        deleted INTEGER NOT NULL DEFAULT 0
    );
    CREATE UNIQUE INDEX adapter_names ON adapters(tenant, name) WHERE deleted = 0;
    CREATE UNIQUE INDEX adapter_models ON adapters(tenant, fine_tuned_model)
        WHERE deleted = 0 AND fine_tuned_model IS NOT NULL;
    CREATE INDEX adapters_of_tenant ON adapters(tenant, seq);
    CREATE TABLE adapter_versions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        adapter_id TEXT NOT NULL REFERENCES adapters(id),
        tenant TEXT NOT NULL,
        number INTEGER NOT NULL,
        digest TEXT NOT NULL,
        path TEXT NOT NULL,
        rank INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        job_id TEXT,
        step INTEGER,
        deleted INTEGER NOT NULL DEFAULT 0,
        files_gone INTEGER NOT NULL DEFAULT 0,
        UNIQUE (adapter_id, number)
    );
    CREATE INDEX versions_of_adapter ON adapter_versions(tenant, adapter_id, number);
    CREATE TABLE usage_ledger (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        request_id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL REFERENCES tenants(id),
        model TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE INDEX usage_of_tenant ON usage_ledger(tenant, created_at);
    CREATE TABLE submissions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL,
        key TEXT,
        key_id TEXT NOT NULL,
        body_hash TEXT NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs(id),
        created_at INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX submission_keys ON submissions(tenant, key) WHERE key IS NOT NULL;
    CREATE INDEX submission_bodies ON submissions(tenant, key_id, body_hash, created_at);
    """,
    # what a prompt cost: with several choices it is neither the prompt nor the prompt less what was cached
    "ALTER TABLE usage_ledger ADD COLUMN computed_tokens INTEGER NOT NULL DEFAULT 0;",
    """
    CREATE TABLE checkpoint_permissions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL REFERENCES tenants(id),
        model_id TEXT NOT NULL,
        project TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    );
    CREATE UNIQUE INDEX permission_of_project ON checkpoint_permissions(tenant, model_id, project) WHERE revoked = 0;
    CREATE INDEX permissions_by_model ON checkpoint_permissions(project, model_id);
    """,
)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to this release's tables. Raises StoreUnavailable if a newer release wrote it."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreUnavailable(
            f"The database has schema version {version}; this release knows {len(MIGRATIONS)}. "
            "Run the release that wrote it, or a newer one."
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
