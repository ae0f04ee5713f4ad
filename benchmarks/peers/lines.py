"""A worker's side of the conversation: JSON lines in, JSON lines out. Needs nothing but the standard library.

What libraries print goes to standard error: the answers have the original standard output to themselves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Lines:
    """Make one before any library that may print is imported."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, ready: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Say `ready`, then answer requests until standard input ends."""
        self._send(ready)
        for line in sys.stdin:
            self._send(answer(json.loads(line)))

    def _send(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()
