"""RMSNorm, rotary embedding and gated activation as differentiable functions over the Triton kernels.

Norm weights and rotary tables are frozen: they get no gradient. Imports Triton: only for CUDA tensors, or under
its interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coserve.kernels.layer import kernel
from coserve.kernels.layer.reference import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """See `coserve.kernels.layer.reference.rms_norm`."""
    _check(x)
    if weight.requires_grad:
        raise ValueError("the norm's weight asks for a gradient; it is frozen here")
    return _RmsNorm.apply(x, weight, eps, unit_offset)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `coserve.kernels.layer.reference.rope`."""
    _check(x)
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or cos.shape[1] % 2 or cos.shape[1] > x.shape[2]:
        raise ValueError(f"tables {list(cos.shape)} and {list(sin.shape)} do not turn {list(x.shape)}")
    return _Rope.apply(x, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See `coserve.kernels.layer.reference.gated`."""
    _check(gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, up {up.dtype} {list(up.shape)}: they must agree")
    return _Gated.apply(gate, up, activation)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        rows = _rows(x)
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        kernel.rms_norm(y, rows, weight, eps, unit_offset)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = _rows(x)
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
        kernel.rms_norm_backward(dx, _rows(dy), rows, weight, ctx.eps, ctx.unit_offset)
        return dx.view(x.shape), None, None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _turn(dy, *ctx.saved_tensors, backward=True), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        kernel.gated(_rows(y), _rows(gate), _rows(up), activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
        kernel.gated_backward(_rows(d_gate), _rows(d_up), _rows(dy), _rows(gate), _rows(up), ctx.activation)
        return d_gate, d_up, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    cos, sin, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin, x))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel.rope(y, x, cos, sin, backward)
    return y


def _rows(x: Tensor) -> Tensor:
    """[..., H] -> [rows, H] with columns beside each other; a view where that is possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"got {x.dtype}; the kernels take {', '.join(str(d) for d in DTYPES)}")
