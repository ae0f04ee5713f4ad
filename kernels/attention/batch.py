"""The sequences of one packed forward as tensors that an attention kernel can follow. Plain torch and integers.

Built once an iteration and shared by all layers, whatever their sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.attention.plan import Segment
from coserve.kernels.transfer import integers

_TILE_ROWS = 64  # query rows times heads of a group that a prefill program holds


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Sequences are numbered as in `segments`."""

    segments: tuple[Segment, ...]  # the host's copy
    block_size: int
    tables: Tensor  # int32 [S, most blocks]; block b holds slots [b * block_size, (b + 1) * block_size)
    contexts: Tensor  # int32 [S]: tokens in the cache, this forward's rows included
    starts: Tensor  # int32 [S]: first packed row
    counts: Tensor  # int32 [S]: rows, the newest of the sequence
    prefill: Tensor  # int32 [tiles, 2]: sequence, first of its rows that the tile holds
    decode: Tensor  # int32 [tiles, 2]: the same for sequences of one row
    tile_rows: int  # rows of a prefill tile
    longest_decode: int  # the largest context among sequences of one row


def paged_batch(
    segments: Sequence[Segment], block_size: int, group: int, device: torch.device | str = "cpu"
) -> PagedBatch:
    """One copy to the device, no synchronisation.

    Args:
        segments: disjoint in their rows; blocks beyond a context are ignored.
        group: query heads a K/V head.

    Raises:
        ValueError: a sequence has no row, or more tokens than its blocks hold.
    """
    for s in segments:
        if not 0 < s.rows <= s.context <= len(s.blocks) * block_size:
            raise ValueError(f"segment at row {s.start}: {s.rows} rows and {s.context} tokens do not fit "
                             f"{len(s.blocks)} blocks of {block_size}")  # fmt: skip
    tile_rows = max(1, _TILE_ROWS // group)
    prefill = [(n, row) for n, s in enumerate(segments) if s.rows > 1 for row in range(0, s.rows, tile_rows)]
    # Tiles that see most keys first: the last program to start should not be the longest.
    prefill.sort(key=lambda tile: segments[tile[0]].rows - segments[tile[0]].context - tile[1])
    decode = [(n, 0) for n, s in enumerate(segments) if s.rows == 1]
    wide = max((len(s.blocks) for s in segments), default=0)
    parts = [
        [block for s in segments for block in (*s.blocks, *[0] * (wide - len(s.blocks)))],
        [s.context for s in segments],
        [s.start for s in segments],
        [s.rows for s in segments],
        [number for tile in prefill for number in tile],
        [number for tile in decode for number in tile],
    ]
    packed = integers([n for part in parts for n in part], device)
    on_device = packed.split([len(part) for part in parts])
    return PagedBatch(
        segments=tuple(segments),
        block_size=block_size,
        tables=on_device[0].view(len(segments), wide),
        contexts=on_device[1],
        starts=on_device[2],
        counts=on_device[3],
        prefill=on_device[4].view(-1, 2),
        decode=on_device[5].view(-1, 2),
        tile_rows=tile_rows,
        longest_decode=max((s.context for s in segments if s.rows == 1), default=0),
    )
