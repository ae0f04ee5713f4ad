"""Attention of training rows by Triton, forward and backward: spans of several sequences in one launch.

The counterpart of `training.py`, with the same results and the same statistics (output and log-sum-exp), over
contiguous keys and values. A span's queries are the last rows of its keys, so keys before them are a prefix, and
gradients go to both. No matrix of scores is ever stored. One program owns each tile of dQ, and one each tile of dK
and dV, where it adds up the query heads of a K/V head itself: no atomics (Dao, FlashAttention-2, 2023, section
3.2). Imports Triton: for CUDA tensors, or under its interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coserve.kernels.attention.spans import SpanBatch
from coserve.kernels.attention.training import Score
from coserve.kernels.dot import INTERPRETED, dot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# Views of one packed copy, and what changes with a batch: Triton would compile a kernel for each alignment of theirs.
_OF_THE_BATCH = ["spans", "tiles", "lse_head"]


# ---------------------------------------------------------------------- device functions


@triton.jit
def _rows_of(base, first, row, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a tensor whose rows are `stride` apart; zero outside."""
    d = tl.arange(0, BLOCK)
    where = base + (first + row).to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(where, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _scores(
    q, k, i, j, inside, scale, softcap, window, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """[queries, keys] of capped scores; -inf where key j is hidden from query i or either is not there."""
    scores = dot(q, tl.trans(k), WIDEN) * scale
    if SOFTCAP:  # the exponential may overflow to infinity, which gives 1
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    visible = inside & (j[None, :] <= i[:, None])
    if WINDOW:
        visible = visible & (j[None, :] > i[:, None] - window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _score_gradient(scores, lse, dp, delta, softcap, SOFTCAP: tl.constexpr):
    """d(loss)/d(q·k · scale) from P = exp(S - lse):  P (dP - delta), times the slope of the cap."""
    p = tl.exp(scores - lse[:, None])
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        capped = tl.where(p > 0.0, scores, 0.0) / softcap
        ds = ds * (1.0 - capped * capped)
    return ds


# ---------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_OF_THE_BATCH)
def _forward(
    out, lse, q, k, v, spans, tiles, sinks,
    q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row, lse_head, scale, softcap, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, query head)."""
    span = spans + tl.load(tiles + tl.program_id(0) * 2) * 4
    first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    head = tl.program_id(1)
    start = tl.load(span)
    rows = tl.load(span + 1)
    first_key = tl.load(span + 2)
    keys = tl.load(span + 3)
    row = first + tl.arange(0, BLOCK)
    i = keys - rows + row
    there = row < rows
    own = _rows_of(q + head * q_head, start, row, q_row, there, DIM, BLOCK_D)
    end = tl.minimum(keys - rows + first + BLOCK, keys)
    begin = end * 0
    if WINDOW:
        begin = tl.maximum(keys - rows + first - window + 1, 0)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    summed = tl.full([BLOCK], 0.0, tl.float32)
    if SINKS:
        largest = tl.full([BLOCK], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32)
        summed = tl.full([BLOCK], 1.0, tl.float32)
    total = tl.full([BLOCK, BLOCK_V], 0.0, tl.float32)
    for j0 in range(begin, end, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        tile_k = _rows_of(k + head // GROUP * k_head, first_key, j, k_row, j < end, DIM, BLOCK_D)
        tile_v = _rows_of(v + head // GROUP * v_head, first_key, j, v_row, j < end, VALUE_DIM, BLOCK_V)
        inside = there[:, None] & (j < end)[None, :]
        scores = _scores(own, tile_k, i, j, inside, scale, softcap, window, WINDOW, SOFTCAP, WIDEN)
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        shrink = tl.exp(largest - safe)
        p = tl.exp(scores - safe[:, None])
        summed = summed * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + dot(p.to(tile_v.dtype), tile_v, WIDEN)
        largest = new
    summed = tl.where(there, summed, 1.0)
    e = tl.arange(0, BLOCK_V)
    at = out + head * out_head + (start + row).to(tl.int64)[:, None] * out_row + e[None, :]
    result = (total / summed[:, None]).to(out.dtype.element_ty)
    tl.store(at, result, mask=there[:, None] & (e < VALUE_DIM)[None, :])
    tl.store(lse + head * lse_head + start + row, largest + tl.log(summed), mask=there)


@triton.jit(do_not_specialize=_OF_THE_BATCH)
def _backward_queries(
    dq, q, k, v, grad, lse, delta, spans, tiles,
    q_head, q_row, k_head, k_row, v_head, v_row, grad_head, grad_row, dq_head, dq_row, lse_head, scale, softcap, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, query head): dQ = scale dS K."""
    span = spans + tl.load(tiles + tl.program_id(0) * 2) * 4
    first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    head = tl.program_id(1)
    start = tl.load(span)
    rows = tl.load(span + 1)
    first_key = tl.load(span + 2)
    keys = tl.load(span + 3)
    row = first + tl.arange(0, BLOCK)
    i = keys - rows + row
    there = row < rows
    own = _rows_of(q + head * q_head, start, row, q_row, there, DIM, BLOCK_D)
    own_grad = _rows_of(grad + head * grad_head, start, row, grad_row, there, VALUE_DIM, BLOCK_V)
    own_lse = tl.load(lse + head * lse_head + start + row, mask=there, other=0.0)
    own_delta = tl.load(delta + head * lse_head + start + row, mask=there, other=0.0)
    end = tl.minimum(keys - rows + first + BLOCK, keys)
    begin = end * 0
    if WINDOW:
        begin = tl.maximum(keys - rows + first - window + 1, 0)
    total = tl.full([BLOCK, BLOCK_D], 0.0, tl.float32)
    for j0 in range(begin, end, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        tile_k = _rows_of(k + head // GROUP * k_head, first_key, j, k_row, j < end, DIM, BLOCK_D)
        tile_v = _rows_of(v + head // GROUP * v_head, first_key, j, v_row, j < end, VALUE_DIM, BLOCK_V)
        inside = there[:, None] & (j < end)[None, :]
        scores = _scores(own, tile_k, i, j, inside, scale, softcap, window, WINDOW, SOFTCAP, WIDEN)
        ds = _score_gradient(scores, own_lse, dot(own_grad, tl.trans(tile_v), WIDEN), own_delta, softcap, SOFTCAP)
        total += dot(ds.to(tile_k.dtype), tile_k, WIDEN)
    d = tl.arange(0, BLOCK_D)
    at = dq + head * dq_head + (start + row).to(tl.int64)[:, None] * dq_row + d[None, :]
    tl.store(at, (total * scale).to(dq.dtype.element_ty), mask=there[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=_OF_THE_BATCH)
def _backward_keys(
    dk, dv, q, k, v, grad, lse, delta, spans, tiles,
    q_head, q_row, k_head, k_row, v_head, v_row, grad_head, grad_row, dk_head, dk_row, dv_head, dv_row, lse_head,
    scale, softcap, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, K/V head): dK = scale dSᵀ Q and dV = Pᵀ dO, over the group's heads in their order."""
    span = spans + tl.load(tiles + tl.program_id(0) * 2) * 4
    first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    kv_head = tl.program_id(1)
    start = tl.load(span)
    rows = tl.load(span + 1)
    first_key = tl.load(span + 2)
    keys = tl.load(span + 3)
    j = first + tl.arange(0, BLOCK)
    there = j < keys
    own_k = _rows_of(k + kv_head * k_head, first_key, j, k_row, there, DIM, BLOCK_D)
    own_v = _rows_of(v + kv_head * v_head, first_key, j, v_row, there, VALUE_DIM, BLOCK_V)
    # Rows that see any key of the tile: from the first key's own position to a window behind the last's.
    begin = tl.maximum(first - (keys - rows), 0)
    end = rows
    if WINDOW:
        end = tl.minimum(rows, first + BLOCK - 1 + window - (keys - rows))
    total_k = tl.full([BLOCK, BLOCK_D], 0.0, tl.float32)
    total_v = tl.full([BLOCK, BLOCK_V], 0.0, tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for row0 in range(begin, end, BLOCK):
            row = row0 + tl.arange(0, BLOCK)
            real = row < end
            i = keys - rows + row
            tile_q = _rows_of(q + head * q_head, start, row, q_row, real, DIM, BLOCK_D)
            tile_grad = _rows_of(grad + head * grad_head, start, row, grad_row, real, VALUE_DIM, BLOCK_V)
            tile_lse = tl.load(lse + head * lse_head + start + row, mask=real, other=0.0)
            tile_delta = tl.load(delta + head * lse_head + start + row, mask=real, other=0.0)
            inside = real[:, None] & there[None, :]
            scores = _scores(tile_q, own_k, i, j, inside, scale, softcap, window, WINDOW, SOFTCAP, WIDEN)
            p = tl.exp(scores - tile_lse[:, None])
            total_v += dot(tl.trans(p.to(tile_grad.dtype)), tile_grad, WIDEN)
            dp = dot(tile_grad, tl.trans(own_v), WIDEN)
            ds = _score_gradient(scores, tile_lse, dp, tile_delta, softcap, SOFTCAP)
            total_k += dot(tl.trans(ds.to(tile_q.dtype)), tile_q, WIDEN)
    d = tl.arange(0, BLOCK_D)
    at = dk + kv_head * dk_head + (first_key + j).to(tl.int64)[:, None] * dk_row + d[None, :]
    tl.store(at, (total_k * scale).to(dk.dtype.element_ty), mask=there[:, None] & (d < DIM)[None, :])
    e = tl.arange(0, BLOCK_V)
    at = dv + kv_head * dv_head + (first_key + j).to(tl.int64)[:, None] * dv_row + e[None, :]
    tl.store(at, total_v.to(dv.dtype.element_ty), mask=there[:, None] & (e < VALUE_DIM)[None, :])


# ---------------------------------------------------------------------- launch


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, batch: SpanBatch, score: Score, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [Hq, T, D], k [Hkv, N, D], v [Hkv, N, Dv] -> out [Hq, T, Dv] and log-sum-exp [Hq, T] in float32.

    Rows of no span are zero.

    Raises:
        ValueError: dtype or head size is not supported.
    """
    _check(q, k, v)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    if len(batch.query_tiles):
        _forward[(len(batch.query_tiles), q.shape[0])](
            out, lse, q, k, v, batch.spans, batch.query_tiles, out if sinks is None else sinks,
            *_strides(q, k, v, out), lse.stride(0), *_numbers(score),
            **_constants(q, k, v, batch, score), SINKS=sinks is not None,
        )  # fmt: skip
    return out, lse


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, batch: SpanBatch, score: Score
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) for grad [Hq, T, Dv]; shapes as in `varlen_forward`. Sinks enter through lse only."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta, lse = (grad.float() * out.float()).sum(-1).contiguous(), lse.contiguous()  # [Hq, T], of the same strides
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if len(batch.query_tiles):
        shared = (q, k, v, grad, lse, delta, batch.spans)
        constants = _constants(q, k, v, batch, score)
        _backward_queries[(len(batch.query_tiles), q.shape[0])](
            dq, *shared, batch.query_tiles, *_strides(q, k, v, grad, dq), lse.stride(0), *_numbers(score), **constants
        )  # fmt: skip
        _backward_keys[(len(batch.key_tiles), k.shape[0])](
            dk, dv, *shared, batch.key_tiles, *_strides(q, k, v, grad, dk, dv), lse.stride(0), *_numbers(score),
            **constants,
        )  # fmt: skip
    return dq, dk, dv


class VarlenAttention(torch.autograd.Function):
    """Differentiable in q, k and v; with `stored` (out, lse) of these rows the forward is not repeated."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: SpanBatch, score: Score, sinks: Tensor | None,
        stored: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        out, lse = varlen_forward(q, k, v, batch, score, sinks) if stored is None else stored
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.batch, ctx.score = batch, score
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        return *varlen_backward(grad, q, k, v, out, lse, ctx.batch, ctx.score), None, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in (t.stride(0), t.stride(1))]


def _numbers(score: Score) -> tuple[float, float, int]:
    return score.scale, score.softcap or 0.0, score.sliding_window or 0


def _constants(q: Tensor, k: Tensor, v: Tensor, batch: SpanBatch, score: Score) -> dict[str, Any]:
    dim, value_dim = q.shape[2], v.shape[2]
    return {
        "GROUP": q.shape[0] // k.shape[0], "DIM": dim, "VALUE_DIM": value_dim, "BLOCK": batch.block,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "WINDOW": score.sliding_window is not None, "SOFTCAP": score.softcap is not None, "WIDEN": INTERPRETED,
    }  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: the kernel takes one dtype for all, "
            f"one of {', '.join(str(d) for d in DTYPES)}"
        )
    if max(q.shape[2], v.shape[2]) > LARGEST_HEAD:
        raise ValueError(f"heads of {q.shape[2]} and {v.shape[2]} values: the kernel takes at most {LARGEST_HEAD}")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous")
