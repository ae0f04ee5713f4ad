"""Attention of inference rows over the paged K/V cache, in plain torch.

The K/V of the newest rows is already in the cache. K/V is never repeated for grouped heads: a decode row's
group of query heads becomes its query length. Softmax is float32, float64 for float64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coserve.kernels.attention.plan import AttentionPlan, Unit


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every segment of the plan; rows of no segment are left zero.

    Args:
        query: [T, Hq, D].
        keys: one layer's cache, [slots, Hkv, D] with Hq a multiple of Hkv.
        values: [slots, Hkv, Dv].
        scale: factor on q·k.
        sliding_window: key j is visible to query i iff i - window < j <= i.
        softcap: scores become softcap * tanh(score / softcap) before masking.
        sinks: [Hq], one more logit a head, that takes probability and gives no value.

    Returns:
        [T, Hq, Dv] in the query's dtype.
    """
    units = plan.units(sliding_window)
    pieces = [_attend(query, keys, values, unit, scale, softcap, sinks) for unit in units]
    if len(units) == 1 and units[0].covers(query.shape[0]):
        return pieces[0]
    out = query.new_zeros(query.shape[0], query.shape[1], values.shape[-1])
    for unit, piece in zip(units, pieces, strict=True):
        out[unit.query] = piece
    return out


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, unit: Unit, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The rows of one unit: [batch * rows, Hq, Dv]."""
    q = query[unit.query] if isinstance(unit.query, slice) else query.index_select(0, unit.query)
    k, v = _gather(keys, unit), _gather(values, unit)
    q = q.view(unit.batch, unit.rows, *query.shape[1:])
    if softcap is None and sinks is None:
        result = _fused(q, k, v, unit, scale)
    else:
        result = _explicit(q, k, v, unit, scale, softcap, sinks)
    return result.reshape(unit.batch * unit.rows, query.shape[1], values.shape[-1])


def _gather(cache: Tensor, unit: Unit) -> Tensor:
    """[batch, Hkv, length, dim]: a view of the cache where the slots are consecutive."""
    read = cache[unit.slots] if isinstance(unit.slots, slice) else cache.index_select(0, unit.slots)
    return read.view(unit.batch, unit.length, *cache.shape[1:]).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, unit: Unit, scale: float) -> Tensor:
    """q [batch, rows, Hq, D] -> [batch, rows, Hq, Dv] by torch's fused attention."""
    batch, rows, heads, dim = q.shape
    if rows == 1:
        grouped = q.view(batch, k.shape[1], heads // k.shape[1], dim)
        bias = None if unit.bias is None else unit.bias.expand(-1, -1, grouped.shape[2], -1)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias, scale=scale).reshape(batch, 1, heads, -1)
    result = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=unit.bias, is_causal=unit.causal, scale=scale,
        enable_gqa=k.shape[1] != heads,
    )  # fmt: skip
    return result.transpose(1, 2)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, unit: Unit, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The same with every score at hand, for what the fused function does not know."""
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    exact = torch.promote_types(q.dtype, torch.float32)
    # [batch, Hkv, group * rows, D]: row r of group member g stands at g * rows + r.
    grouped = q.view(batch, rows, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(grouped, k.transpose(2, 3)).to(exact) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, kv_heads, group, rows, unit.length)
    if unit.causal:
        hidden = torch.ones(rows, unit.length, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif unit.bias is not None:
        scores = scores + unit.bias.view(batch, 1, 1, rows, unit.length).to(exact)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        sink = sinks.to(exact).view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, rows, -1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    weights = weights.reshape(batch, kv_heads, group * rows, unit.length).to(v.dtype)
    result = torch.matmul(weights, v).view(batch, kv_heads, group, rows, -1)
    return result.permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, -1)
