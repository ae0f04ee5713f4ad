"""Reads JSON Lines one line at a time and trusts nothing: every bad line becomes a fault, and reading goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from coserve.server.data.faults import RowFault
from coserve.server.data.strict_json import MOST_PARTS, DuplicateKey, too_many_parts, unique_keys

LONGEST_LINE = 16 * 2**20  # bytes
_BOM = b"\xef\xbb\xbf"


def read_rows(stream: BinaryIO, *, longest_line: int = LONGEST_LINE) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """(1-based line number, the object on it or what is wrong with it). Blank lines at the end of the file are none."""
    blank: list[int] = []
    number = 0
    while raw := stream.readline(longest_line + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw) > longest_line:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(longest_line)
            yield number, RowFault(None, f"the line is longer than {longest_line} bytes", "Split it.")
            continue
        if not raw.strip():
            blank.append(number)
            continue
        for line in blank:
            yield line, RowFault(None, "the line is empty", "Remove it.")
        blank.clear()
        yield number, _parse(raw)


def _parse(raw: bytes) -> dict[str, Any] | RowFault:
    if too_many_parts(raw):
        return RowFault(None, f"the row has more than {MOST_PARTS} objects, arrays and keys", "Split it.")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return RowFault(None, f"byte {error.start + 1} is not UTF-8", "Save the file as UTF-8.")
    except DuplicateKey as error:
        return RowFault(repr(str(error))[1:-1][:80], "the field stands twice in one object", "Give it once.")
    except RecursionError:
        return RowFault(None, "the JSON is nested too deeply", "A row is an object of texts or token ids.")
    except _Constant as error:
        return RowFault(None, f"{error} is not JSON", "Use a number or null.")
    except json.JSONDecodeError as error:
        return RowFault(None, f"not JSON: {error.msg} at column {error.colno}", "Write one JSON object a line.")
    except ValueError:
        return RowFault(None, "not JSON: a number is too long", "Write one JSON object a line.")
    if not isinstance(value, dict):
        return RowFault(
            None, f"the line holds {_kind(value)}, not an object", 'Write one JSON object a line, as {"text": "…"}.'
        )
    return value


class _Constant(Exception):
    """NaN or an infinity, which Python's parser would accept."""


def _refuse_constant(name: str) -> None:
    raise _Constant(name)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "a number"
