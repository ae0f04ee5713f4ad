"""The append-only event file of a job, one JSON object a line: the only record of what the job did.

The engine writes it, the gateway reads it. A line counts once it is whole; a torn last line is cut off on opening.
The result table is a fold over this file, so a resumed job cannot contradict itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from coserve.server.training.durable import sync_directory

Record = dict[str, Any]

RESULT_COLUMNS = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


class EventLog:
    """Appends events; each one is on the disk when `append` returns.

    `clock` gives unix seconds. `last` is the newest record, or None.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = path
        fresh = not path.exists()
        self._file: BinaryIO = open(path, "r+b" if not fresh else "x+b")  # noqa: SIM115 - lives as long as the log
        self.last: Record | None = None
        self._size = 0
        for line in self._file:
            record = _whole_record(line, self.seq + 1)
            if record is None:
                break
            self.last = record
            self._size += len(line)
        self._cut()
        if fresh:
            sync_directory(path.parent)

    @property
    def seq(self) -> int:
        """The number of the newest event; 0 before the first."""
        return self.last["seq"] if self.last else 0

    def append(self, kind: str, level: str, message: str, data: Record) -> tuple[int, Record]:
        """Write one event and return (its number, the record).

        Raises OSError when it cannot be written, for instance for lack of room; the file is then as before.
        """
        record: Record = {
            "seq": self.seq + 1,
            "created_at": self._clock(),
            "kind": kind,
            "level": level,
            "message": message,
            "data": data,
        }
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._reopen()
            raise
        self._size += len(line)
        self.last = record
        return record["seq"], record

    def close(self) -> None:
        self._file.close()

    def records(self) -> Iterator[Record]:
        """All events from the first one on."""
        return read_events(self._path)

    def _cut(self) -> None:
        """Drop what lies behind the last whole event, and stand at the end."""
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() > self._size:
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())
        self._file.seek(self._size)

    def _reopen(self) -> None:
        """Forget a failed write: buffered bytes must not reach the file later."""
        try:
            self._file.close()
        except OSError:
            pass  # closing flushes once more and fails for the reason that is being reported
        self._file = open(self._path, "r+b")  # noqa: SIM115 - lives as long as the log
        self._cut()


def read_events(path: Path) -> Iterator[Record]:
    """The whole events of a file, in order; an incomplete last line is left out."""
    seq = 0
    with open(path, "rb") as file:
        for line in file:
            record = _whole_record(line, seq + 1)
            if record is None:
                return
            seq += 1
            yield record


def result_table(records: Iterable[Record]) -> str:
    """The text of result.csv: a row for every step that counted, without those that a resume threw away."""
    rows: dict[int, Record] = {}
    for record in records:
        data = record["data"]
        if record["kind"] == "started":
            rows = {step: row for step, row in rows.items() if step <= data.get("step", 0)}
        elif record["kind"] == "step":
            rows[data["step"]] = data
    lines = [",".join(RESULT_COLUMNS)]
    for step in sorted(rows):
        lines.append(",".join(_cell(rows[step].get(column)) for column in RESULT_COLUMNS))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else repr(value)


def _whole_record(line: bytes, seq: int) -> Record | None:
    """The record of a line if it is whole, well formed and the next one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get("seq") == seq else None
