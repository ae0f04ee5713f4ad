"""What the kernels of both families share: tiles of the pool's pages, of hidden values, and how sums are divided.

Imports Triton: for CUDA tensors, or under its interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coserve.kernels.lora.pages import SitePages

TILE_COLUMNS = 128  # of A, B, x and y that a program takes at a time
_MOST_SPLITS = 8
_PROGRAMS = 128  # a Hopper card has 132 multiprocessors: with fewer programs than that, a long sum is split
# Views of one packed copy, and what changes with a batch: Triton would compile a kernel for each alignment of theirs.
ROUTING = ["rows", "owners", "blocks", "row_count"]
PAGES = ["numbers", "index", "scaling", "columns", "adapters", "max_rank"]

# ---------------------------------------------------------------------- device functions


@triton.jit
def rank_rows(
    flat, numbers, first, r, rank, column, width, page_elements, BLOCK: tl.constexpr, IN_ROW: tl.constexpr
):  # fmt: skip
    """Rank rows r [R], columns [column, column + BLOCK), of the tensors whose page lists begin at `first`.

    Zero beyond rank and width. `first` and `rank` are numbers, or [R] where the rows are of several tensors. IN_ROW:
    BLOCK divides width and page, so a page never ends inside a row of the tile and one look-up a row is enough; and
    the compiler is told so, as it else would load value by value what can be loaded 16 bytes at a time.
    """
    first = first + r * 0
    if IN_ROW:
        there = r < tl.where(column < width, rank, 0)
        at = r * width + column
        page = tl.load(numbers + first + at // page_elements, mask=there, other=0).to(tl.int64)
        start = tl.multiple_of(page * page_elements + at % page_elements, BLOCK)
        where = start[:, None] + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None]
    else:
        columns = column + tl.arange(0, BLOCK)
        inside = (r < rank)[:, None] & (columns < width)[None, :]
        at = r[:, None] * width + columns[None, :]
        page = tl.load(numbers + first[:, None] + at // page_elements, mask=inside, other=0).to(tl.int64)
        where = page * page_elements + at % page_elements
    return tl.load(flat + where, mask=inside, other=0.0)


@triton.jit
def hidden_values(hidden, m, r, inside, row_count, max_rank, SPLITS: tl.constexpr):
    """Rows m, ranks r of one slice's hidden values, the pieces of its sum added first to last.

    m and r have the dimensions of `inside`.
    """
    where = m * max_rank + r
    total = tl.load(hidden + where, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(hidden + split * row_count * max_rank + where, mask=inside, other=0.0)
    return total


@triton.jit
def first_column(columns, which, SLICES: tl.constexpr):
    """Where slice `which` begins in y: behind the outputs of the slices before it."""
    offset = which * 0
    for nth in tl.static_range(SLICES - 1):
        offset += tl.where(nth < which, tl.load(columns + nth * 2 + 1), 0)
    return offset


# ---------------------------------------------------------------------- on the host


def hidden_buffer(rows: int, pages: SitePages, splits: int) -> Tensor:
    """[S, splits, N, largest rank] float32, uninitialised: only each row's own ranks are ever written or read."""
    shape = (pages.slices, splits, rows, pages.max_rank)
    return torch.empty(shape, dtype=torch.float32, device=pages.flat.device)


def splits_of(programs: int, width: int) -> int:
    """Pieces of a sum over `width` columns: only launches whose programs would not fill a card split."""
    splits = 1
    while splits < _MOST_SPLITS and programs * splits < _PROGRAMS and width >= 2 * splits * TILE_COLUMNS:
        splits *= 2
    return splits


def block_of_ranks(ranks: int) -> int:
    return 16 if ranks <= 16 else 32 if ranks <= 32 else 64


def in_row(widths: tuple[int, ...], page_elements: int) -> bool:
    """See `rank_rows`."""
    return all(n % TILE_COLUMNS == 0 for n in (page_elements, *widths))
