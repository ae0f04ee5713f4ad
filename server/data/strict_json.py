"""What any JSON of a tenant is held to before and while it is parsed: a bound on its parts, and no key twice.

The parser runs without a break, so a text of a million brackets would stop the whole process for seconds.
"""

from __future__ import annotations

import re
from typing import Any

MOST_PARTS = 32_768  # objects, arrays and keys; numbers and texts in a list are not counted
_MARKS = (b"[", b"{", b":")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class DuplicateKey(Exception):
    """An object has a key twice, which is the text: whichever value counted would be a guess."""


def too_many_parts(raw: bytes) -> bool:
    """Whether the text has more objects, arrays and keys than are parsed. Brackets inside strings are none."""
    if sum(map(raw.count, _MARKS)) <= MOST_PARTS:
        return False
    bare = _STRING.sub(b"", raw)
    return sum(map(bare.count, _MARKS)) > MOST_PARTS


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`. Raises DuplicateKey."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return value
