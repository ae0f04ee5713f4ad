"""The elementwise rest of a decoder layer in plain torch: RMSNorm, rotary embedding, gated activation.

Computed in float32 (float64 for float64), rounded once where the models of transformers round.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]  # gelu: with erf; gelu_tanh: its approximation by tanh


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """x [..., H] / sqrt(mean(x²) + eps), times weight [H]; Llama's kind, or Gemma's with `unit_offset`.

    Gemma multiplies by 1 + weight and rounds the product; Llama rounds before the product and after it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by the angles of tables cos, sin [T, R]: column i with column i + R / 2, for i < R / 2.

    Columns R and up stay as they are (partial rotary embedding).
    """
    rotary = cos.shape[-1]
    wide = x[..., :rotary].to(torch.promote_types(x.dtype, torch.float32))
    left, right = wide.chunk(2, -1)
    c, s = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    turned = (wide * c + torch.cat((-right, left), -1) * s).to(x.dtype)
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, [T, I] each."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    active = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate=_APPROXIMATE[activation])
    return (active * up.to(wide.dtype)).to(gate.dtype)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
