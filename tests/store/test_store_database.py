"""The database: what is acknowledged is on disk, what fails leaves nothing, and failures stay with who caused them."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from coserve.server.store.database import Database
from coserve.server.store.errors import StorageFull, StoreUnavailable
from coserve.server.store.store import Store


@pytest.fixture
def database(tmp_path):
    opened = Database(tmp_path / "test.db")
    asyncio.run(opened.write(lambda connection: connection.execute("CREATE TABLE t (x INTEGER UNIQUE)")))
    yield opened
    opened.close()


def values(database):
    return asyncio.run(database.read(lambda c: [row[0] for row in c.execute("SELECT x FROM t ORDER BY x")]))


def insert(value):
    return lambda connection: connection.execute("INSERT INTO t VALUES (?)", (value,)).rowcount


def test_settings_that_keep_what_was_acknowledged(database):
    def pragmas(connection):
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]

    assert asyncio.run(database.read(pragmas)) == ["wal", 2]  # 2 is FULL


def test_a_failing_operation_takes_back_only_itself(database):
    def half_then_fail(connection):
        insert(100)(connection)
        raise KeyError("planted")

    async def together():
        gate = threading.Event()
        blocker = asyncio.create_task(database.read(lambda connection: gate.wait(5)))
        await asyncio.sleep(0.05)  # the thread is busy now, so what follows waits together and shares a commit
        writes = [
            asyncio.create_task(database.write(call)) for call in (insert(1), half_then_fail, insert(1), insert(2))
        ]
        await asyncio.sleep(0.05)
        gate.set()
        await blocker
        return await asyncio.gather(*writes, return_exceptions=True)

    first, second, third, fourth = asyncio.run(together())
    assert (first, fourth) == (1, 1)
    assert isinstance(second, KeyError)
    assert isinstance(third, sqlite3.IntegrityError)
    assert values(database) == [1, 2]


def test_reads_cannot_write(database):
    asyncio.run(database.read(insert(7)))
    assert values(database) == []


def test_a_cancelled_caller_does_not_undo_its_write(database):
    async def cancelled():
        task = asyncio.create_task(database.write(insert(5)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    asyncio.run(database.write(insert(6)))  # behind it in the queue
    assert values(database) == [5, 6]


def test_full_disk_is_told_apart_and_leaves_nothing(database):
    async def fill():
        await database.write(insert(1))
        await database.read(lambda connection: connection.execute("PRAGMA max_page_count = 1"))
        with pytest.raises(StorageFull, match="free disk space"):
            await database.write(
                lambda connection: connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(2, 50_000)])
            )
        await database.read(lambda connection: connection.execute("PRAGMA max_page_count = 100000"))
        await database.write(insert(3))

    asyncio.run(fill())
    assert values(database) == [1, 3]


def test_a_newer_schema_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "new.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreUnavailable, match="schema version 99"):
        Database(tmp_path / "new.db")


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "bad.db").write_bytes(b"this is not a database, and long enough to be one" * 100)
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        Database(tmp_path / "bad.db")
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(StoreUnavailable):
        Database(tmp_path / "link.db")


def test_closing_finishes_what_was_submitted_and_refuses_more(tmp_path):
    def make_table(name):
        return lambda connection: connection.execute(f"CREATE TABLE {name} (x)").rowcount

    async def submit():
        database = Database(tmp_path / "x.db")
        pending = [asyncio.create_task(database.write(make_table(name))) for name in ("t1", "t2", "t3")]
        await asyncio.sleep(0)
        database.close()
        database.close()
        await asyncio.gather(*pending)
        with pytest.raises(StoreUnavailable, match="closed"):
            await database.read(make_table("t4"))

    asyncio.run(submit())
    with sqlite3.connect(tmp_path / "x.db") as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert {"t1", "t2", "t3"} <= names and "t4" not in names
    assert (tmp_path / "x.db").stat().st_mode & 0o077 == 0


_WRITER = """
import asyncio, sys
from pathlib import Path
from coserve.server.store.store import Store
from coserve.server.store.jobs import NewJob

async def main():
    store = Store(Path(sys.argv[1]))
    await store.tenants.ensure_default()
    while True:
        job, _ = await store.jobs.create("default", NewJob("m", "file-x", 1, {}, {}, {}, {}))
        print(job.id, flush=True)

asyncio.run(main())
"""


@pytest.mark.faults
def test_acknowledged_jobs_survive_kill_9(tmp_path):
    path = tmp_path / "coserve.db"
    writer = subprocess.Popen([sys.executable, "-P", "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        acknowledged = [writer.stdout.readline().strip() for _ in range(20)]
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.communicate()[0].split("\n")[:-1]
    acknowledged += [line for line in rest if len(line) == len(acknowledged[0])]
    store = Store(path)
    try:
        found = [asyncio.run(store.jobs.get("default", job_id)) for job_id in acknowledged]
    finally:
        store.close()
    assert len(found) >= 20
    assert all(job is not None and job.status == "validating_files" for job in found)
