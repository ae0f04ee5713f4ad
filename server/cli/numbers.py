"""Numbers of the command line: what is no number in JSON is none here either."""

from __future__ import annotations

import math
from typing import Any

import click


class _Finite(click.types.FloatParamType):
    """A float that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


FINITE = _Finite()
