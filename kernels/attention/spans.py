"""The spans of one pass of training rows as tensors that an attention kernel can follow. Plain torch and integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.transfer import integers


@dataclass(frozen=True, slots=True)
class KeySpan:
    """Query rows [start, start + rows) are the last `rows` of the keys [first_key, first_key + keys)."""

    start: int
    rows: int
    first_key: int
    keys: int


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """Built once a pass and shared by its layers."""

    spans: Tensor  # int32 [S, 4]: start, rows, first_key, keys
    query_tiles: Tensor  # int32 [tiles, 2]: span, first of its rows
    key_tiles: Tensor  # int32 [tiles, 2]: span, first of its keys
    block: int  # rows, and keys, of a tile


def span_batch(spans: Sequence[KeySpan], head_bytes: int, device: torch.device | str = "cpu") -> SpanBatch:
    """One copy to the device, no synchronisation.

    Args:
        spans: disjoint in their rows and in their keys.
        head_bytes: of one query head's row, from which the tiles' size follows: they share a multiprocessor's memory.

    Raises:
        ValueError: a span has no row, or fewer keys than rows.
    """
    for s in spans:
        if not 0 < s.rows <= s.keys:
            raise ValueError(f"the span at row {s.start} has {s.rows} rows and {s.keys} keys")
    block = 64 if head_bytes <= 256 else 32 if head_bytes <= 512 else 16
    parts = [
        [number for s in spans for number in (s.start, s.rows, s.first_key, s.keys)],
        [number for n, s in enumerate(spans) for first in range(0, s.rows, block) for number in (n, first)],
        [number for n, s in enumerate(spans) for first in range(0, s.keys, block) for number in (n, first)],
    ]
    packed = integers([n for part in parts for n in part], device)
    table, query_tiles, key_tiles = packed.split([len(part) for part in parts])
    return SpanBatch(table.view(-1, 4), query_tiles.view(-1, 2), key_tiles.view(-1, 2), block)
