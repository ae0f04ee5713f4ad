"""Which rows of a packed batch use which adapter, sorted into blocks of one adapter each.

Built once an iteration from the batch's row ranges; every layer and both directions share it. Rows of no
adapter are absent: they cost a kernel nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.transfer import integers

CHUNK_ROWS = 512  # rows that one program of a weight gradient adds up; longer groups are split and reduced


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, end) of the packed batch use adapter number `adapter` of the page table."""

    start: int
    end: int
    adapter: int


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows grouped by adapter, and the pieces of these groups that programs work on."""

    ranges: tuple[RowRange, ...]
    adapters: int
    block_rows: int
    rows: Tensor  # int32 [N]: packed row numbers, those of adapter 0 first, in their order within an adapter
    owners: Tensor  # int32 [N]: the adapter of each of them; -1: an entry that only fills up
    blocks: Tensor  # int32 [blocks, 3]: adapter, first index into `rows`, length <= block_rows
    chunks: Tensor  # int32 [chunks, 3]: the same with at most chunk_rows rows
    chunk_starts: Tensor  # int32 [adapters + 1]: adapter i owns chunks [chunk_starts[i], chunk_starts[i + 1])


def block_rows_for(ranges: Sequence[RowRange]) -> int:
    """Rows of a block: 16, the least a matrix unit takes, unless groups fill larger ones (then 32 or 64)."""
    used = len({r.adapter for r in ranges})
    mean = sum(r.end - r.start for r in ranges) // max(1, used)
    return 64 if mean >= 64 else 32 if mean >= 32 else 16


def route(
    ranges: Sequence[RowRange], adapters: int, *, block_rows: int | None = None, chunk_rows: int = CHUNK_ROWS,
    device: torch.device | str = "cpu",
) -> Routing:  # fmt: skip
    """Group the rows by adapter. One copy to the device, no synchronisation.

    Args:
        ranges: ascending and disjoint; empty ones are allowed.
        adapters: how many the page table holds.
        block_rows: rows of a block; None chooses by `block_rows_for`.

    Raises:
        ValueError: ranges overlap, descend or name an adapter that is not there.
    """
    _check(ranges, adapters)
    size = block_rows_for(ranges) if block_rows is None else block_rows
    rows, blocks = grouped(ranges, adapters, size)
    _, chunks = grouped(ranges, adapters, chunk_rows)
    counts = [0] * adapters
    for adapter in chunks[::3]:
        counts[adapter] += 1
    chunk_starts = list(itertools.accumulate(counts, initial=0))
    parts = (rows, owners_of(blocks), blocks, chunks, chunk_starts)
    on_device = integers(list(itertools.chain(*parts)), device).split([len(part) for part in parts])
    return Routing(
        tuple(ranges), adapters, size,
        on_device[0], on_device[1], on_device[2].view(-1, 3), on_device[3].view(-1, 3), on_device[4],
    )  # fmt: skip


def grouped(ranges: Sequence[RowRange], adapters: int, size: int) -> tuple[list[int], list[int]]:
    """Packed rows by adapter, and (adapter, first, length) of the pieces of at most `size` rows, flat."""
    groups: list[list[int]] = [[] for _ in range(adapters)]
    for r in ranges:
        groups[r.adapter].extend(range(r.start, r.end))
    rows: list[int] = []
    pieces: list[int] = []
    for adapter, group in enumerate(groups):
        pieces += _pieces(adapter, len(rows), len(group), size)
        rows += group
    return rows, pieces


def owners_of(pieces: Sequence[int]) -> list[int]:
    """The adapter of each row of these pieces."""
    return [adapter for adapter, length in zip(pieces[::3], pieces[2::3], strict=True) for _ in range(length)]


def _pieces(adapter: int, first: int, length: int, size: int) -> list[int]:
    """(adapter, first, length) of the pieces of one group, flat."""
    flat: list[int] = []
    for begin in range(0, length, size):
        flat += (adapter, first + begin, min(size, length - begin))
    return flat


def _check(ranges: Sequence[RowRange], adapters: int) -> None:
    end = 0
    for r in ranges:
        if not end <= r.start <= r.end:
            raise ValueError(f"rows [{r.start}, {r.end}) begin before row {end} or end before they begin")
        if not 0 <= r.adapter < adapters:
            raise ValueError(f"rows [{r.start}, {r.end}) name adapter {r.adapter}; the page table holds {adapters}")
        end = r.end
