"""Iterations of decode rows alone, in fixed shapes: what a CUDA graph replays. Pure integers; nothing here is a tensor.

A graph reads its inputs where it read them when it was captured. So rows are rounded up to a few sizes, and everything
that differs from one iteration to the next (tokens, positions, block tables, whose adapter a row uses) lies in two
arrays of integers at fixed places. Rows that are only there to fill up write into a scratch block that nobody owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coserve.kernels.lora.families import Family
from coserve.kernels.lora.routing import RowRange, grouped, owners_of

BLOCK_ROWS = 16  # of one adapter, in a launch of decode rows
_RANKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """One graph each."""

    rows: int
    rank: int  # the largest that its launches cover; 0: the base model alone, without any LoRA launch
    width: int  # blocks of a block table
    family: Family = Family.GROUPED  # of its LoRA launches


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence whose newest token runs."""

    token: int
    context: int  # tokens of the sequence once it has run
    blocks: Sequence[int]
    adapter: int | None = None  # number in the page table


def rows_for(count: int) -> int:
    """`count` rounded up: 1, 2, 4, multiples of 8 to 64, of 16 to 256, of 64 from there. A fifth more rows at most, or
    seven: decoding is bound by bytes that do not depend on them."""
    if count <= 4:
        return 1 if count <= 1 else 2 if count == 2 else 4
    step = 8 if count <= 64 else 16 if count <= 256 else 64
    return -(-count // step) * step


def sizes(most: int) -> tuple[int, ...]:
    """All that up to `most` rows are rounded up to."""
    return tuple(sorted({rows_for(count) for count in range(1, most + 1)}))


def shape_for(count: int, largest_rank: int, width: int, family: Family = Family.GROUPED) -> DecodeShape | None:
    """For `count` rows whose adapters have at most this rank (0: none has an adapter); None: no graph is that large."""
    rank = next((r for r in (0, *_RANKS) if largest_rank <= r), None)
    return None if rank is None else DecodeShape(rows_for(count), rank, width, family)


class DecodeArrays:
    """Where everything lies. `wide` int64: tokens, positions, cache slots; `narrow` int32: the rest."""

    def __init__(self, shape: DecodeShape, block_size: int, scratch_block: int) -> None:
        self.shape, self._block_size, self._scratch = shape, block_size, scratch_block
        rows = shape.rows
        self.wide_sizes = (rows, rows, rows)
        # Context lengths, block tables, and the routing: packed rows, their adapters, and (adapter, first, length) of
        # each block.
        self.narrow_sizes = (rows, rows * shape.width, rows, rows, 3 * rows)

    def fill(self, wide: np.ndarray, narrow: np.ndarray, batch: Sequence[DecodeRow]) -> None:
        """Write a batch of at most `shape.rows` rows into arrays of `sum(wide_sizes)` and `sum(narrow_sizes)`."""
        shape, size, used = self.shape, self._block_size, len(batch)
        tokens, positions, slots = np.split(wide, np.cumsum(self.wide_sizes)[:-1])
        contexts, tables, rows, owners, blocks = np.split(narrow, np.cumsum(self.narrow_sizes)[:-1])
        tokens[used:], positions[used:], contexts[used:] = 0, 0, 1
        slots[used:] = self._scratch * size
        tables = tables.reshape(shape.rows, shape.width)
        tables[used:, 0] = self._scratch
        for number, row in enumerate(batch):
            last = row.context - 1
            tokens[number], positions[number], contexts[number] = row.token, last, row.context
            slots[number] = row.blocks[last // size] * size + last % size
            held = -(-row.context // size)
            tables[number, :held] = row.blocks[:held]
        # Blocks without rows are there in every replay, and rows without an adapter: their programs end at once.
        ranges = [RowRange(n, n + 1, row.adapter) for n, row in enumerate(batch) if row.adapter is not None]
        packed, pieces = grouped(ranges, 1 + max((r.adapter for r in ranges), default=-1), BLOCK_ROWS)
        rows[:], owners[:], blocks[:] = 0, -1, 0
        rows[: len(packed)], owners[: len(packed)], blocks[: len(pieces)] = packed, owners_of(pieces), pieces
