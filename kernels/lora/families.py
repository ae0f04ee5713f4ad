"""Which of two families of launches adds the terms of a pass.

| family | shrink | expand | for |
|---|---|---|---|
| grouped | blocks of 16 to 64 rows of one adapter | the same blocks | prompts, training, every backward |
| per row | all rows with all adapters' A at once | row by row | few rows, most of them of different adapters |

Nothing here was measured by this project: the limits are where arithmetic and others' published choices put them,
and a benchmark may set its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Family(Enum):
    GROUPED = "grouped"
    PER_ROW = "per row"


@dataclass(frozen=True, slots=True)
class FamilyLimits:
    """The most that `PER_ROW` takes. Ranks are not asked: per rank both families read the same bytes."""

    # A value of A takes part in 2 FLOP a row, its own adapter's or not. A Hopper card has time for some 370 of them in
    # bfloat16 while it reads the value, so far more rows would do; SGLang's tables for that card go over at 32.
    rows: int = 32
    # In float32, without the matrix unit, it has time for some 60: 16 rows leave half of that for the rest.
    rows_float32: int = 16
    # Each row reads its B, the first of an adapter's from memory and the others from a cache that is no more than a
    # few times as fast. The grouped family reads it once for 16 rows.
    rows_an_adapter: int = 4


LIMITS = FamilyLimits()


def family_for(
    rows: int, adapters: int, dtype: torch.dtype, *, gradients: bool, limits: FamilyLimits | None = LIMITS
) -> Family:
    """For `rows` rows with an adapter, of `adapters` different ones.

    Args:
        gradients: the pass is differentiated; only the grouped family has a backward, and such passes are large.
        limits: None keeps everything grouped.
    """
    if gradients or limits is None:
        return Family.GROUPED
    most = limits.rows_float32 if dtype == torch.float32 else limits.rows
    few = rows <= most and rows <= limits.rows_an_adapter * adapters
    return Family.PER_ROW if few else Family.GROUPED
