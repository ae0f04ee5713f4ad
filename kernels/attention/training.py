"""Attention of training rows over contiguous keys and values, forward and backward, with the softmax statistics.

One call is one span of one sequence: queries at positions [start, start + T) read keys [0, start + T) (or the
last `window` of them). The forward returns the log-sum-exp of every query row, from which the backward rebuilds
the probabilities (Dao et al., FlashAttention-2, 2023, section 3.2); storing output and log-sum-exp is enough
to replay a row. Torch's own flash kernel does the work on a CPU; plain matrix products everywhere else, and
for soft-capped scores and attention sinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Score:
    """How a layer turns q·k into probabilities."""

    scale: float
    sliding_window: int | None = None  # key j is visible to query i iff i - window < j <= i
    softcap: float | None = None  # scores become cap * tanh(score / cap)


class MaskCache:
    """Additive masks of the spans of one pass, shared by its layers: spans repeat from layer to layer."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def get(self, start: int, queries: int, window: int | None) -> Tensor | None:
        """[T, start + T] of 0 and -inf, or None where plain causal masking from the corner is the same."""
        key = (start, queries, window)
        if key not in self._masks:
            self._masks[key] = self._build(start, queries, window)
        return self._masks[key]

    def _build(self, start: int, queries: int, window: int | None) -> Tensor | None:
        keys = start + queries
        if start == 0 and (window is None or window >= keys):
            return None
        i = torch.arange(start, keys, device=self._device)[:, None]
        j = torch.arange(keys, device=self._device)[None, :]
        hidden = j > i
        if window is not None:
            hidden |= j <= i - window
        return torch.zeros(queries, keys, dtype=self._dtype, device=self._device).masked_fill_(hidden, -math.inf)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, score: Score, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [Hq, T, D], k [Hkv, N, D], v [Hkv, N, Dv], mask [T, N] or None (causal from the corner, T == N)
    -> out [Hq, T, Dv] in q's dtype and log-sum-exp [Hq, T] in float32 (float64 for float64)."""
    if _flash(q, v, score, sinks):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, mask is None, attn_mask=_wide(mask), scale=score.scale
        )
        return out[0], lse[0]
    scores = _scores(q, k, mask, score)
    lse = torch.logsumexp(scores, -1) if sinks is None else _lse_with_sinks(scores, sinks)
    out = torch.exp(scores - lse[..., None]) @ _expand(v, q.shape[0]).to(scores.dtype)
    return out.to(q.dtype), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, score: Score,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) for grad [Hq, T, Dv]; shapes as in `attention_forward`.

    With P = exp(S - lse):  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)),  dQ = c dS K,  dK = c dSᵀ Q.
    Sinks only enter through lse; the sink logits are frozen.
    """
    heads, kv_heads = q.shape[0], k.shape[0]
    if _flash(q, v, score, sinks):
        # Torch's kernel has one thread a key head: with fewer of those than threads, repeat them (as a view).
        repeat = heads // kv_heads if kv_heads < min(heads, torch.get_num_threads()) else 1
        wide_k, wide_v = (_repeat(t, repeat) for t in (k, v))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[None], q[None], wide_k[None], wide_v[None], out[None], lse[None], 0.0, mask is None,
            attn_mask=_wide(mask), scale=score.scale,
        )  # fmt: skip
        dk, dv = (g[0].view(kv_heads, repeat, *g.shape[2:]).sum(1) if repeat > 1 else g[0] for g in (dk, dv))
        return dq[0], dk, dv
    capped = _scores(q, k, mask, score)
    grad, out = grad.to(capped.dtype), out.to(capped.dtype)
    p = torch.exp(capped - lse[..., None])
    wide_k, wide_v = _expand(k, heads).to(capped.dtype), _expand(v, heads).to(capped.dtype)
    ds = p * (grad @ wide_v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    if score.softcap is not None:
        ds = ds * (1 - (capped.masked_fill(p == 0, 0.0) / score.softcap) ** 2)
    ds = ds * score.scale
    dq = ds @ wide_k
    dk, dv = ds.transpose(-1, -2) @ q.to(capped.dtype), p.transpose(-1, -2) @ grad
    group = heads // kv_heads
    dk, dv = (g.view(kv_heads, group, *g.shape[1:]).sum(1) for g in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class Attention(torch.autograd.Function):
    """Differentiable attention of one span; with `stored` (out, lse) of these rows the forward is not repeated."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, score: Score, sinks: Tensor | None,
        stored: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        out, lse = attention_forward(q, k, v, mask, score, sinks) if stored is None else stored
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.score, ctx.sinks = mask, score, sinks
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = attention_backward(grad, q, k, v, out, lse, ctx.mask, ctx.score, ctx.sinks)
        return dq, dk, dv, None, None, None, None


def _flash(q: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> bool:
    plain = score.softcap is None and sinks is None and q.shape[-1] == v.shape[-1]
    return plain and q.device.type == "cpu"


def _wide(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None, None]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, score: Score) -> Tensor:
    """[Hq, T, N] in float32 or wider, capped and masked."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ _expand(k, q.shape[0]).to(wide).transpose(-1, -2)) * score.scale
    if score.softcap is not None:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    if mask is None:
        n = scores.shape[-1]
        return scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores + mask.to(wide)


def _lse_with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    sink = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.logsumexp(torch.cat([scores, sink], -1), -1)


def _repeat(t: Tensor, times: int) -> Tensor:
    """[Hkv, N, D] -> [Hkv * times, N, D], each head `times` times in a row."""
    return t if times == 1 else t[:, None].expand(-1, times, -1, -1).reshape(t.shape[0] * times, *t.shape[1:])


def _expand(t: Tensor, heads: int) -> Tensor:
    """[Hkv, N, D] -> [Hq, N, D]: each key head serves a group of query heads."""
    return _repeat(t, heads // t.shape[0])
