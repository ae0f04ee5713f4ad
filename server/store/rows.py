"""What the repositories share: pages of a list, and JSON columns."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from coserve.server.store.errors import UnknownCursor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    has_more: bool


def page(
    connection: sqlite3.Connection,
    table: str,
    build: Callable[[sqlite3.Row], T],
    *,
    where: str,
    values: Sequence[Any],
    shown: str = "1",
    after: str | None,
    limit: int,
    ascending: bool = False,
) -> Page[T]:
    """Rows of `table` matching `where` and `shown`, newest first, after the row whose id is `after`.

    `where` says whose rows they are and also bounds `after`, else UnknownCursor; `shown` hides rows (deleted ones)
    that may still be a cursor, so that a client can delete while it pages. Both are our own constant SQL.
    """
    clause, arguments = f"({where}) AND ({shown})", list(values)
    if after is not None:
        cursor = connection.execute(f"SELECT seq FROM {table} WHERE ({where}) AND id = ?", [*values, after]).fetchone()
        if cursor is None:
            raise UnknownCursor(after)
        clause += f" AND seq {'>' if ascending else '<'} ?"
        arguments.append(cursor["seq"])
    order = "ASC" if ascending else "DESC"
    rows = connection.execute(
        f"SELECT * FROM {table} WHERE {clause} ORDER BY seq {order} LIMIT ?", [*arguments, limit + 1]
    ).fetchall()
    return Page(tuple(build(row) for row in rows[:limit]), len(rows) > limit)


def dump(value: Any) -> str | None:
    """JSON text of a column; None stays NULL."""
    return None if value is None else json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def load(text: str | None) -> Any:
    return None if text is None else json.loads(text)
