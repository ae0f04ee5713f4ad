"""Paged attention by one Triton kernel: chunks of prompts, and decode rows with their keys split among programs.

Same results as `reference.py`, over the same cache, from nothing but block tables, context lengths and where each
sequence's rows begin. A program takes some rows of one sequence with all query heads of one K/V head, and runs
over the keys they can see, slot by slot through the block table, with the softmax computed online (Dao et al.,
FlashAttention, 2022). Where rows are few, a sequence's keys are divided among `splits` programs, whose partial
results a second kernel combines in a fixed order: no atomics. Imports Triton: for CUDA tensors, or under its
interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coserve.kernels.attention.batch import PagedBatch
from coserve.kernels.dot import INTERPRETED, dot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
_KEYS = 64  # keys that a program looks at at a time; half of them where a key has more than 512 bytes
_PROGRAMS = 264  # two for each multiprocessor of a Hopper card: with fewer, decode splits its keys
_MOST_SPLITS = 16

# Views of one packed copy, and what changes with a batch: Triton would compile a kernel for each alignment of theirs.
_OF_THE_BATCH = ["tables", "contexts", "starts", "counts", "tiles", "table_row"]

# ---------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_OF_THE_BATCH)
def _attend(
    out, part_out, part_max, part_sum, query, keys, values, tables, contexts, starts, counts, tiles, sinks,
    query_row, query_head, key_slot, key_head, value_slot, value_head, out_row, out_head, table_row,
    scale, softcap, window,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLITS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile, K/V head, split): row m of the tile is query row m // GROUP, head m % GROUP of the group.

    One split writes `out`; several write unnormalised sums, maxima and sums of exponentials of their keys.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles + tile * 2)
    first_row = tl.load(tiles + tile * 2 + 1)
    context = tl.load(contexts + sequence)
    count = tl.load(counts + sequence)

    m = tl.arange(0, BLOCK_M)
    row = first_row + m // GROUP
    head = kv_head * GROUP + m % GROUP
    real = (m < ROWS * GROUP) & (row < count)
    position = context - count + row
    packed = (tl.load(starts + sequence) + row).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    at = query + packed[:, None] * query_row + head[:, None] * query_head + d[None, :]
    q = tl.load(at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)

    # Keys that any row of the tile can see, and this split's share of them.
    end = tl.minimum(context - count + first_row + ROWS, context)
    begin = end * 0
    if WINDOW:
        begin = tl.maximum(context - count + first_row - window + 1, 0)
    steps = (end - begin + BLOCK_N * SPLITS - 1) // (BLOCK_N * SPLITS)
    begin += split * steps * BLOCK_N
    end = tl.minimum(end, begin + steps * BLOCK_N)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    summed = tl.full([BLOCK_M], 0.0, tl.float32)
    if SINKS and SPLITS == 1:
        largest = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
        summed = tl.full([BLOCK_M], 1.0, tl.float32)
    total = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        block = tl.load(tables + sequence * table_row + j // BLOCK_SIZE, mask=j < end, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + j % BLOCK_SIZE
        k = tl.load(
            keys + slot[:, None] * key_slot + kv_head * key_head + d[None, :],
            mask=(j < end)[:, None] & (d < DIM)[None, :], other=0.0,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), WIDEN) * scale
        if SOFTCAP:  # softcap * tanh(score / softcap); the exponential may overflow to infinity, which gives 1
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        visible = (j < end)[None, :] & (j[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (j[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        shrink = tl.exp(largest - safe)
        p = tl.exp(scores - safe[:, None])
        summed = summed * shrink + tl.sum(p, 1)
        v = tl.load(
            values + slot[:, None] * value_slot + kv_head * value_head + e[None, :],
            mask=(j < end)[:, None] & (e < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        total = total * shrink[:, None] + dot(p.to(v.dtype), v, WIDEN)
        largest = new

    if SPLITS == 1:
        summed = tl.where(real, summed, 1.0)
        to = out + packed[:, None] * out_row + head[:, None] * out_head + e[None, :]
        result = (total / summed[:, None]).to(out.dtype.element_ty)
        tl.store(to, result, mask=real[:, None] & (e < VALUE_DIM)[None, :])
    else:
        place = (tile * tl.num_programs(1) * GROUP + head) * SPLITS + split  # [tile, query head, split]
        tl.store(part_max + place, largest, mask=real)
        tl.store(part_sum + place, summed, mask=real)
        to = part_out + place.to(tl.int64)[:, None] * VALUE_DIM + e[None, :]
        tl.store(to, total, mask=real[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["starts", "tiles"])
def _combine(
    out, part_out, part_max, part_sum, starts, tiles, sinks, out_row, out_head,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, SINKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (tile, query head): the splits of one decode row, weighted by how much each saw."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    place = (tile * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    maxima = tl.load(part_max + place)
    largest = tl.max(maxima, 0)
    sink = 0.0
    if SINKS:
        logit = tl.load(sinks + head).to(tl.float32)
        largest = tl.maximum(largest, logit)
        sink = tl.exp(logit - largest)
    weights = tl.exp(maxima - largest)
    e = tl.arange(0, BLOCK_V)
    at = part_out + place.to(tl.int64)[:, None] * VALUE_DIM + e[None, :]
    total = tl.sum(tl.load(at, mask=(e < VALUE_DIM)[None, :], other=0.0) * weights[:, None], 0)
    summed = tl.sum(tl.load(part_sum + place) * weights, 0) + sink
    row = tl.load(starts + tl.load(tiles + tile * 2)).to(tl.int64)
    to = out + row * out_row + head * out_head + e
    tl.store(to, (total / summed).to(out.dtype.element_ty), mask=e < VALUE_DIM)


# ---------------------------------------------------------------------- launch


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float, *,
    sliding_window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every sequence of the batch; rows of no sequence are left zero.

    Args:
        query: [T, Hq, D].
        keys: one layer's cache, [slots, Hkv, D] with Hq a multiple of Hkv.
        values: [slots, Hkv, Dv].
        scale: factor on q·k.
        sliding_window: key j is visible to query i iff i - window < j <= i.
        softcap: scores become softcap * tanh(score / softcap) before masking.
        sinks: [Hq], one more logit a head, that takes probability and gives no value.
        splits: among how many programs a decode row's keys are divided, a power of two; None chooses from shapes.

    Returns:
        [T, Hq, Dv] in the query's dtype.

    Raises:
        ValueError: dtype or head size is not supported.
    """
    rows, heads, dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[2]
    if not (query.dtype == keys.dtype == values.dtype) or query.dtype not in DTYPES:
        raise ValueError(
            f"query is {query.dtype}, keys {keys.dtype}, values {values.dtype}: the kernel takes one dtype for all, "
            f"one of {', '.join(str(d) for d in DTYPES)}"
        )
    if max(dim, value_dim) > LARGEST_HEAD:
        raise ValueError(f"heads of {dim} and {value_dim} values: the kernel takes at most {LARGEST_HEAD}")
    if any(t.stride(-1) != 1 for t in (query, keys, values)):
        raise ValueError("the last dimension of query, keys and values must be contiguous")
    out = query.new_zeros(rows, heads, value_dim)
    if len(batch.prefill):
        _launch(out, query, keys, values, batch, batch.prefill, batch.tile_rows, 1, None, scale, sliding_window,
                softcap, sinks)  # fmt: skip
    if len(batch.decode):
        length = batch.longest_decode if sliding_window is None else min(batch.longest_decode, sliding_window)
        count = splits_for(len(batch.decode) * kv_heads, length) if splits is None else splits
        parts = None
        if count > 1:
            shape = (len(batch.decode), heads, count)
            parts = [query.new_empty(*shape, *more, dtype=torch.float32) for more in ((value_dim,), (), ())]
        _launch(out, query, keys, values, batch, batch.decode, 1, count, parts, scale, sliding_window, softcap, sinks)
        if parts is not None:
            _combine[(len(batch.decode), heads)](
                out, *parts, batch.starts, batch.decode, sinks, out.stride(0), out.stride(1),
                VALUE_DIM=value_dim, BLOCK_V=triton.next_power_of_2(value_dim), SINKS=sinks is not None, SPLITS=count,
            )  # fmt: skip
    return out


def splits_for(programs: int, length: int) -> int:
    """Programs for each decode row and K/V head, from shapes alone: as many as fill a card, of 64 keys or more each."""
    splits = 1
    while splits < _MOST_SPLITS and programs * splits < _PROGRAMS and length >= 2 * splits * _KEYS:
        splits *= 2
    return splits


def keys_at_a_time(query: Tensor) -> int:
    """Keys of one step, so that a program's tiles fit a multiprocessor's shared memory."""
    return _KEYS if query.shape[-1] * query.element_size() <= 512 else _KEYS // 2


def _launch(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, tiles: Tensor, tile_rows: int,
    splits: int, parts: list[Tensor] | None, scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    kv_heads = keys.shape[1]
    group = query.shape[1] // kv_heads
    part_out, part_max, part_sum = parts or (out, out, out)
    _attend[(len(tiles), kv_heads, splits)](
        out, part_out, part_max, part_sum, query, keys, values,
        batch.tables, batch.contexts, batch.starts, batch.counts, tiles, out if sinks is None else sinks,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        out.stride(0), out.stride(1), batch.tables.stride(0),
        scale, softcap or 0.0, window or 0,
        BLOCK_SIZE=batch.block_size, GROUP=group, ROWS=tile_rows, DIM=query.shape[2], VALUE_DIM=values.shape[2],
        BLOCK_M=max(16, triton.next_power_of_2(tile_rows * group)), BLOCK_N=keys_at_a_time(query),
        BLOCK_D=max(16, triton.next_power_of_2(query.shape[2])),
        BLOCK_V=max(16, triton.next_power_of_2(values.shape[2])),
        WINDOW=window is not None, SOFTCAP=softcap is not None, SINKS=sinks is not None, SPLITS=splits,
        WIDEN=INTERPRETED,
    )  # fmt: skip
