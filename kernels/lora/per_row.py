"""The family for small batches: a shrink that takes the rank rows of all adapters at once, an expand row by row.

With few rows the time goes into reading A and B. The shrink multiplies every row with every adapter's A, side by side
as if they were one matrix, and keeps of each row what belongs to its adapter: A is read once however many rows share
it, no tile is padded to a rank or to a block of rows, and the products too many are hidden behind the reading. The
expand has no use for the matrix unit: a row and its adapter's B are a vector and a matrix.

Forward only, into the same hidden values [S, splits, N, R] as the grouped family, whose backward serves both. Sums
are float32 in one order, fixed by the shapes. Launchers check nothing; see `function.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from coserve.kernels.dot import INTERPRETED, dot
from coserve.kernels.lora.pages import SitePages
from coserve.kernels.lora.routing import Routing
from coserve.kernels.lora.tiles import (
    PAGES,
    ROUTING,
    TILE_COLUMNS,
    block_of_ranks,
    first_column,
    hidden_values,
    in_row,
    rank_rows,
    splits_of,
)

_MOST_ROWS = 64  # of a program of the shrink; more rows take more programs, each reading A again

# ---------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=ROUTING + PAGES)
def _shrink_all(
    out, x, rows, owners, flat, numbers, index, columns,
    x_stride, row_count, adapters, max_rank, page_elements,
    SPLITS: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    IN_ROW: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[slice, split, m, r] = sum over the split's columns k of x[rows[m], k] A[r, k], A that of owners[m].

    One program: BLOCK_R of the adapters' rank rows, counted through from the first adapter to the last, one split of
    one slice, BLOCK_M rows.
    """
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    owner = tl.load(owners + m, mask=m < row_count, other=-1)
    # Which adapter's, and which of its rank rows, is each of these? Of all adapters at most one holds it.
    piece = tl.program_id(1)  # slice * SPLITS + split
    which = piece // SPLITS
    adapter = tl.arange(0, ADAPTERS)
    where = index + (which * adapters + adapter) * 4
    ranks = tl.load(where, mask=adapter < adapters, other=0)[None, :]
    before = tl.load(where + 3, mask=adapter < adapters, other=0)[None, :]
    lists = tl.load(where + 1, mask=adapter < adapters, other=0)[None, :]
    nth = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    holds = (nth >= before) & (nth < before + ranks)  # [BLOCK_R, ADAPTERS]
    rank = tl.sum(tl.where(holds, ranks, 0), 1)  # 0 beyond the last
    if (tl.max(rank) > 0) & (tl.max(owner) >= 0):
        r = tl.sum(tl.where(holds, nth - before, 0), 1)
        pages = tl.sum(tl.where(holds, lists, 0), 1)
        holder = tl.sum(tl.where(holds, adapter[None, :], 0), 1)
        width = tl.load(columns + which * 2)
        if IN_ROW:
            width = tl.multiple_of(width, BLOCK_K)
        row = tl.load(rows + m, mask=owner >= 0, other=0).to(tl.int64)
        total = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
        steps = (width + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
        start = piece % SPLITS * steps * BLOCK_K
        for step in range(steps):
            k = start + step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = (owner >= 0)[:, None] & (k < width)[None, :]
            left = tl.load(x + row[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
            right = rank_rows(
                flat, numbers, pages, r, rank, start + step * BLOCK_K, width, page_elements, BLOCK_K, IN_ROW
            )
            total += dot(left, tl.trans(right), WIDEN)
        to = out + (piece.to(tl.int64) * row_count + m[:, None]) * max_rank + r[None, :]
        tl.store(to, total, mask=(owner[:, None] == holder[None, :]) & (rank > 0)[None, :])


@triton.jit(do_not_specialize=ROUTING + PAGES)
def _expand_rows(
    y, hidden, rows, owners, flat, numbers, index, scaling, columns,
    y_stride, row_count, adapters, max_rank, page_elements,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, IN_ROW: tl.constexpr,
):  # fmt: skip
    """y[rows[m], offset + n] += s sum over r of hidden[slice, m, r] B[slice, r, n], s and B those of owners[m].

    One program: a row, BLOCK_N columns, one slice. Rows run fastest, so those of one adapter, which are neighbours,
    read a tile of B at about the same time: from memory once, from the cache then.
    """
    m = tl.program_id(0)
    owner = tl.load(owners + m)
    which = tl.program_id(2)
    column = tl.program_id(1) * BLOCK_N
    width = tl.load(columns + which * 2 + 1)
    if (owner >= 0) & (column < width):
        where = index + (which * adapters + owner) * 4
        rank = tl.load(where)
        if rank > 0:
            pages = tl.load(where + 2)
            own = hidden + which.to(tl.int64) * SPLITS * row_count * max_rank
            total = tl.full([BLOCK_N], 0.0, tl.float32)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                left = hidden_values(own, m, r, r < rank, row_count, max_rank, SPLITS)
                right = rank_rows(flat, numbers, pages, r, rank, column, width, page_elements, BLOCK_N, IN_ROW)
                total += tl.sum(left[:, None] * right.to(tl.float32), 0)
            offset = first_column(columns, which, SLICES)
            if IN_ROW:
                width, offset = tl.multiple_of(width, BLOCK_N), tl.multiple_of(offset, BLOCK_N)
            n = column + tl.arange(0, BLOCK_N)
            to = y + tl.load(rows + m).to(tl.int64) * y_stride + offset + n
            total = total * tl.load(scaling + which * adapters + owner)
            total += tl.load(to, mask=n < width, other=0.0).to(tl.float32)
            tl.store(to, total.to(y.dtype.element_ty), mask=n < width)


# ---------------------------------------------------------------------- launchers


def splits_for_all(pages: SitePages) -> int:
    """Pieces of the shrink's sum, from shapes alone."""
    # As if the rank rows were one adapter's: of the adapters that the table has room for, many may be absent.
    return splits_of(-(-pages.max_rank // _block_r(pages)) * pages.slices, pages.in_width)


def shrink_all(out: Tensor, x: Tensor, routing: Routing, pages: SitePages) -> None:
    """out [S, splits, N, R] = x[rows] Aᵀ; x [T, in]."""
    count, splits = len(routing.rows), out.shape[1]
    block_m, block_r = min(_MOST_ROWS, max(16, triton.next_power_of_2(count))), _block_r(pages)
    most = max(sum(ranks) for ranks in pages.ranks)
    _shrink_all[(-(-most // block_r), pages.slices * splits, -(-count // block_m))](
        out, x, routing.rows, routing.owners, pages.flat, pages.numbers, pages.index, pages.columns,
        x.stride(0), count, pages.adapters, pages.max_rank, pages.page_elements,
        SPLITS=splits, ADAPTERS=triton.next_power_of_2(pages.adapters), BLOCK_M=block_m, BLOCK_R=block_r,
        BLOCK_K=TILE_COLUMNS, IN_ROW=in_row((pages.in_width,), pages.page_elements), WIDEN=INTERPRETED,
    )  # fmt: skip


def expand_rows(y: Tensor, hidden: Tensor, routing: Routing, pages: SitePages) -> None:
    """y[rows] += s hidden B: every slice adds to its own columns of y [T, sum of out widths]."""
    count = len(routing.rows)
    _expand_rows[(count, -(-max(pages.out_widths) // TILE_COLUMNS), pages.slices)](
        y, hidden, routing.rows, routing.owners, pages.flat, pages.numbers, pages.index, pages.scaling, pages.columns,
        y.stride(0), count, pages.adapters, pages.max_rank, pages.page_elements,
        SLICES=pages.slices, SPLITS=hidden.shape[1], BLOCK_R=min(32, block_of_ranks(pages.max_rank)),
        BLOCK_N=TILE_COLUMNS, IN_ROW=in_row(pages.out_widths, pages.page_elements),
    )  # fmt: skip


def _block_r(pages: SitePages) -> int:
    """Rank rows of a program of the shrink: many, as each program reads x again, which the cache must bear."""
    return block_of_ranks(pages.adapters * pages.max_rank)
