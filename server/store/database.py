"""One SQLite connection and the one thread that uses it.

Callers are coroutines of the gateway's loop; they hand over functions of a connection and await the answer, so
the loop never waits for a disk. An awaited write is committed and synced. Writes that wait together share one
commit, each in a savepoint of its own: one that fails takes back only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from coserve.server.store.errors import StorageFull, StoreUnavailable
from coserve.server.store.schema import migrate

T = TypeVar("T")
GROUP = 64  # at most so many operations share a commit


@dataclass(frozen=True, slots=True)
class _Operation:
    call: Callable[[sqlite3.Connection], Any]
    write: bool
    done: Future


class Database:
    """`await read(call)`, `await write(call)`; `call` gets the connection, in the store's thread."""

    def __init__(self, path: Path) -> None:
        """Open, or create, the database at `path`. Raises StoreUnavailable. Blocks for a few milliseconds."""
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._closed = False
        self._gate = threading.Lock()  # orders submissions before the close
        opened: Future = Future()
        self._thread = threading.Thread(target=self._work, args=(path, opened), name="coserve-store", daemon=True)
        self._thread.start()
        opened.result()

    async def read(self, call: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.wrap_future(self._submit(call, write=False))

    async def write(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """Run `call` in a transaction; it is committed when this returns. A cancelled caller does not undo it."""
        return await asyncio.shield(asyncio.wrap_future(self._submit(call, write=True)))

    def close(self) -> None:
        """Finish what was submitted, then close. Idempotent."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _submit(self, call: Callable[[sqlite3.Connection], Any], *, write: bool) -> Future:
        operation = _Operation(call, write, Future())
        with self._gate:
            if self._closed:
                raise StoreUnavailable("The database is closed: the server is shutting down.")
            self._queue.put(operation)
        return operation.done

    # ------------------------------------------------------------------ in the store's thread

    def _work(self, path: Path, opened: Future) -> None:
        try:
            connection = _connect(path)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits in __init__
            opened.set_exception(_translate(error))
            return
        opened.set_result(None)
        with contextlib.closing(connection):
            open_ = True
            while open_:
                waiting = [self._queue.get()]
                while len(waiting) < GROUP:
                    try:
                        waiting.append(self._queue.get_nowait())
                    except queue.Empty:
                        break
                open_ = None not in waiting
                operations = [one for one in waiting if one is not None]
                # Reads first: what their callers have awaited is committed already.
                for one in operations:
                    if not one.write and one.done.set_running_or_notify_cancel():
                        _read(connection, one)
                writes = [one for one in operations if one.write and one.done.set_running_or_notify_cancel()]
                if writes:
                    _write(connection, writes)


def _connect(path: Path) -> sqlite3.Connection:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.close(descriptor)
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: sqlite3.Connection, operation: _Operation) -> None:
    try:
        connection.execute("BEGIN")
        try:
            result = operation.call(connection)
        finally:
            _rollback(connection)
    except BaseException as error:  # noqa: BLE001 - carried to the awaiting coroutine
        operation.done.set_exception(_translate(error))
    else:
        operation.done.set_result(result)


def _write(connection: sqlite3.Connection, operations: Sequence[_Operation]) -> None:
    """Run all in one transaction and answer only after its commit is on disk."""
    answers: list[tuple[_Operation, Any, BaseException | None]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for one in operations:
            connection.execute("SAVEPOINT one")
            try:
                answers.append((one, one.call(connection), None))
            except BaseException as error:
                if not connection.in_transaction:  # SQLite took back the whole group (disk full, I/O error)
                    raise
                connection.execute("ROLLBACK TO one")
                answers.append((one, None, error))
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    except BaseException as error:  # noqa: BLE001 - carried to the awaiting coroutines
        _rollback(connection)
        answers = [(one, None, error) for one in operations]
    for one, result, failure in answers:
        if failure is None:
            one.done.set_result(result)
        else:
            one.done.set_exception(_translate(failure))


def _rollback(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _translate(error: BaseException) -> BaseException:
    if isinstance(error, sqlite3.IntegrityError) or not isinstance(error, sqlite3.Error | OSError):
        return error
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        translated: StoreUnavailable = StorageFull("No room left for the database; free disk space and try again.")
    else:
        translated = StoreUnavailable(
            f"The database cannot be used ({error}); check that its folder is writable, or restore it from a backup."
        )
    translated.__cause__ = error
    return translated
