"""Reads published request traces: one CSV row a request, columns as BurstGPT's or Azure's."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path


def read_trace(file: Path) -> list[tuple[float, int, int]]:
    """(seconds since the first, prompt tokens, output tokens) of requests that had an answer, by time. Columns are
    found by name: `timestamp` (seconds, or a date), `request tokens` or `contexttokens`, `response tokens` or
    `generatedtokens`."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = {name.strip().lower(): name for name in (rows[0] if rows else {})}
    try:
        at = names["timestamp"]
        prompt = names.get("request tokens") or names["contexttokens"]
        outputs = names.get("response tokens") or names["generatedtokens"]
        found = sorted((_seconds(r[at]), int(r[prompt]), int(r[outputs])) for r in rows)
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{file}: not a trace with timestamp, request tokens and response tokens: {error}") from None
    return [(when - found[0][0], p, o) for when, p, o in found if p > 0 and o > 0]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text.strip()[:26]).timestamp()
