"""Reads what was recorded elsewhere: request traces with BurstGPT's or Azure's columns, and an engine's iterations."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any


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


def read_iterations(file: Path) -> list[dict[str, Any]]:
    """The records of a saved answer of GET /v1/coserve/iterations: tokens, units, and seconds measured, predicted and
    at most (0 where an older server did not say)."""
    try:
        content = json.loads(file.read_text())
        records = content["data"] if isinstance(content, dict) else content
        return [
            {
                "tokens": dict(r["tokens"]), "units": int(r.get("units", 0)), "measured_s": float(r["measured_s"]),
                "predicted_s": float(r.get("predicted_s", 0.0)), "upper_s": float(r.get("upper_s", 0.0)),
            }
            for r in records
        ]  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{file}: not an answer of GET /v1/coserve/iterations: {error}") from None
