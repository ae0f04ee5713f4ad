"""Reading a job's event file, which the engine appends to while it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 4 * 1024**2


def read_after(path: Path, seq: int) -> list[dict[str, Any]]:
    """The whole records numbered above `seq`, in order; a last line that is still being written is left out. Blocks."""
    records: list[dict[str, Any]] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return records
    expected = 1
    with file:
        while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            if expected > seq:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not isinstance(record, dict) or record.get("seq") != expected:
                    break
                records.append(record)
            expected += 1
    return records
