"""The family for groups of rows, both directions: shrink, expand, and the weight gradients with their reduce.

Forward y += s (x Aᵀ) B is shrink by A and expand by B; the gradient dx += s (dy Bᵀ) A is shrink by B and expand
by A; dA = s (dy Bᵀ)ᵀ x and dB = s (x Aᵀ)ᵀ dy are one kernel with the sides exchanged. A and B are read where they
lie, in the pool's pages, at each adapter's own rank. Sums are float32; every sum has one order, fixed by the
shapes alone: pieces of a long sum are written apart and added by whoever reads them, never by atomics.

Launchers take buffers from their caller and check nothing but what they choose themselves; see `function.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from coserve.kernels.dot import INTERPRETED, dot
from coserve.kernels.lora.pages import A, SitePages
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

_CHUNKS = ["hidden", "rows", "chunks", "chunk_starts", "index", "scaling", "row_count", "max_rank", "offset", "width"]

# ---------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=ROUTING + PAGES)
def _shrink(
    out, x, rows, blocks, flat, numbers, index, columns,
    x_stride, row_count, adapters, max_rank, page_elements,
    PART: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, IN_ROW: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[slice, split, m, r] = sum over the split's columns k of x[rows[m], k] W[r, k].

    One program: a block of rows, BLOCK_R ranks, one split of one slice.
    """
    block = blocks + tl.program_id(0) * 3
    adapter = tl.load(block)
    first = tl.load(block + 1)
    length = tl.load(block + 2)
    piece = tl.program_id(2)  # slice * SPLITS + split
    which = piece // SPLITS
    where = index + (which * adapters + adapter) * 4
    rank = tl.load(where)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (tl.program_id(1) * BLOCK_R < rank) & (length > 0):
        pages = tl.load(where + PART)
        width = tl.load(columns + which * 2 + PART - 1)
        offset = which * 0
        if PART == 2:
            offset = first_column(columns, which, SLICES)
        if IN_ROW:
            width, offset = tl.multiple_of(width, BLOCK_K), tl.multiple_of(offset, BLOCK_K)
        m = tl.arange(0, BLOCK_M)
        row = tl.load(rows + first + m, mask=m < length, other=0).to(tl.int64)
        total = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
        steps = (width + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
        start = piece % SPLITS * steps * BLOCK_K
        for step in range(steps):
            k = start + step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = (m < length)[:, None] & (k < width)[None, :]
            left = tl.load(x + row[:, None] * x_stride + (offset + k)[None, :], mask=inside, other=0.0)
            right = rank_rows(
                flat, numbers, pages, r, rank, start + step * BLOCK_K, width, page_elements, BLOCK_K, IN_ROW
            )
            total += dot(left, tl.trans(right), WIDEN)
        to = out + (piece.to(tl.int64) * row_count + first + m[:, None]) * max_rank + r[None, :]
        tl.store(to, total, mask=(m < length)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=ROUTING + PAGES)
def _expand(
    y, hidden, rows, blocks, flat, numbers, index, scaling, columns,
    y_stride, row_count, adapters, max_rank, page_elements,
    PART: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, IN_ROW: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[rows[m], offset + n] += sum over slices of s sum over r of hidden[slice, m, r] W[slice, r, n].

    One program: a block of rows and BLOCK_N columns; of all slices by A, which add to the same columns, of one by B.
    """
    block = blocks + tl.program_id(0) * 3
    adapter = tl.load(block)
    first = tl.load(block + 1)
    length = tl.load(block + 2)
    column = tl.program_id(1) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    width = tl.load(columns + tl.program_id(2) * 2 + PART - 1)
    offset = tl.program_id(2) * 0
    if PART == 2:
        offset = first_column(columns, tl.program_id(2), SLICES)
    if IN_ROW:
        width, offset = tl.multiple_of(width, BLOCK_N), tl.multiple_of(offset, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    ranks = 0
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    if (column < width) & (length > 0):
        for nth in tl.static_range(SLICES if PART == 1 else 1):
            which = tl.program_id(2) + nth
            where = index + (which * adapters + adapter) * 4
            rank = tl.load(where)
            ranks += rank
            pages = tl.load(where + PART)
            own = hidden + which.to(tl.int64) * SPLITS * row_count * max_rank
            part = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                inside = (m < length)[:, None] & (r < rank)[None, :]
                left = hidden_values(own, first + m[:, None], r[None, :], inside, row_count, max_rank, SPLITS)
                right = rank_rows(flat, numbers, pages, r, rank, column, width, page_elements, BLOCK_N, IN_ROW)
                part += dot(left.to(right.dtype), right, WIDEN)
            total += part * tl.load(scaling + which * adapters + adapter)
        if ranks > 0:
            row = tl.load(rows + first + m, mask=m < length, other=0).to(tl.int64)
            inside = (m < length)[:, None] & (n < width)[None, :]
            to = y + row[:, None] * y_stride + (offset + n)[None, :]
            total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
            tl.store(to, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_CHUNKS)
def _weight_grad(
    out, hidden, right, rows, chunks, index,
    right_stride, row_count, max_rank, offset, width,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[chunk, r, n] = sum over the chunk's rows m of hidden[m, r] right[rows[m], offset + n], for one slice."""
    chunk = chunks + tl.program_id(0) * 3
    rank = tl.load(index + tl.load(chunk) * 4)
    first = tl.load(chunk + 1)
    length = tl.load(chunk + 2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(1) * BLOCK_R < rank:
        total = tl.full([BLOCK_R, BLOCK_N], 0.0, tl.float32)
        for m0 in range(0, length, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            inside = (m < length)[:, None] & (r < rank)[None, :]
            left = hidden_values(hidden, first + m[:, None], r[None, :], inside, row_count, max_rank, SPLITS)
            row = tl.load(rows + first + m, mask=m < length, other=0).to(tl.int64)
            inside = (m < length)[:, None] & (n < width)[None, :]
            values = tl.load(right + row[:, None] * right_stride + (offset + n)[None, :], mask=inside, other=0.0)
            total += dot(tl.trans(left.to(values.dtype)), values, WIDEN)
        to = out + (tl.program_id(0).to(tl.int64) * max_rank + r[:, None]) * width + n[None, :]
        tl.store(to, total, mask=(r < rank)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=_CHUNKS)
def _add_chunks(
    out, parts, chunk_starts, index, scaling, max_rank, width, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[ranks before + r, n] = s * sum over the adapter's chunks, first to last; zero for an adapter with none."""
    adapter = tl.program_id(0)
    rank = tl.load(index + adapter * 4)
    before = tl.load(index + adapter * 4 + 3)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (r < rank)[:, None] & (n < width)[None, :]
    if tl.program_id(1) * BLOCK_R < rank:
        total = tl.full([BLOCK_R, BLOCK_N], 0.0, tl.float32)
        start = tl.load(chunk_starts + adapter)
        where = parts + (start.to(tl.int64) * max_rank + r[:, None]) * width + n[None, :]
        for _ in range(start, tl.load(chunk_starts + adapter + 1)):
            total += tl.load(where, mask=inside, other=0.0)
            where += max_rank * width
        total = total * tl.load(scaling + adapter)
        tl.store(out + (before + r[:, None]).to(tl.int64) * width + n[None, :], total, mask=inside)


# ---------------------------------------------------------------------- launchers


def splits_for(routing: Routing, pages: SitePages, width: int) -> int:
    """Pieces of a shrink's sum over `width` columns, from shapes alone."""
    # The fewest blocks that so many rows take: of those that are there, many may be empty.
    return splits_of(-(-len(routing.rows) // routing.block_rows) * pages.slices, width)


def shrink(out: Tensor, x: Tensor, routing: Routing, pages: SitePages, part: int) -> None:
    """out [S, splits, N, R] = x[rows] Wᵀ. W is A and x [T, in], or W is B and x [T, sum of out widths]."""
    widths = (pages.in_width,) if part == A else pages.out_widths
    splits = out.shape[1]
    block_r = block_of_ranks(pages.max_rank)
    grid = (len(routing.blocks), -(-pages.max_rank // block_r), pages.slices * splits)
    _shrink[grid](
        out, x, routing.rows, routing.blocks, pages.flat, pages.numbers, pages.index, pages.columns,
        x.stride(0), len(routing.rows), pages.adapters, pages.max_rank, pages.page_elements,
        PART=part, SLICES=pages.slices, SPLITS=splits, BLOCK_M=routing.block_rows, BLOCK_R=block_r,
        BLOCK_K=TILE_COLUMNS, IN_ROW=in_row(widths, pages.page_elements), WIDEN=INTERPRETED,
    )  # fmt: skip


def expand(y: Tensor, hidden: Tensor, routing: Routing, pages: SitePages, part: int) -> None:
    """y[rows] += s hidden W. W is B: every slice adds to its own columns of y [T, sum of out widths]. W is A: all
    slices add to y [T, in], in their order."""
    together = part == A
    widths = (pages.in_width,) if together else pages.out_widths
    grid = (len(routing.blocks), -(-max(widths) // TILE_COLUMNS), 1 if together else pages.slices)
    _expand[grid](
        y, hidden, routing.rows, routing.blocks, pages.flat, pages.numbers, pages.index, pages.scaling, pages.columns,
        y.stride(0), len(routing.rows), pages.adapters, pages.max_rank, pages.page_elements,
        PART=part, SLICES=pages.slices, SPLITS=hidden.shape[1],
        BLOCK_M=routing.block_rows, BLOCK_R=min(32, block_of_ranks(pages.max_rank)), BLOCK_N=TILE_COLUMNS,
        IN_ROW=in_row(widths, pages.page_elements), WIDEN=INTERPRETED,
        # ptxas before 13.3 miscompiles the pipelined form for sm_90 (triton issue 9433).
        num_stages=1,
    )  # fmt: skip


def weight_grad(
    out: Tensor, parts: Tensor, hidden: Tensor, right: Tensor, offset: int, routing: Routing, pages: SitePages,
    slice_number: int,
) -> None:  # fmt: skip
    """out [sum of ranks, width] = s hiddenᵀ right[rows, offset : offset + width] of every adapter, for one slice.

    Args:
        parts: [chunks, largest rank, width] float32 to work in.
        hidden: [S, splits, N, R] of a shrink; right: [T, offset + width or more].
    """
    if not len(out):
        return
    width, block_r = out.shape[1], min(32, block_of_ranks(pages.max_rank))
    tiles = (-(-pages.max_rank // block_r), -(-width // TILE_COLUMNS))
    index = pages.index[slice_number]
    _weight_grad[(len(routing.chunks), *tiles)](
        parts, hidden[slice_number], right, routing.rows, routing.chunks, index,
        right.stride(0), len(routing.rows), pages.max_rank, offset, width,
        SPLITS=hidden.shape[1], BLOCK_M=min(64, routing.block_rows), BLOCK_R=block_r, BLOCK_N=TILE_COLUMNS,
        WIDEN=INTERPRETED,
    )  # fmt: skip
    _add_chunks[(pages.adapters, *tiles)](
        out, parts, routing.chunk_starts, index, pages.scaling[slice_number], pages.max_rank, width,
        BLOCK_R=block_r, BLOCK_N=TILE_COLUMNS,
    )  # fmt: skip
