"""Triton kernels for RMSNorm, rotary embedding and gated activations, forward and backward.

One pass over the data each, float32 inside, rounded once. A backward writes new buffers and never its inputs;
every element of a result has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # of a gated activation that one program does
_HEADS = 8  # of a rotary embedding


@triton.jit
def _rms_norm(
    y, x, weight, y_row, x_row, width, eps, UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < width
    v = tl.load(x + row * x_row + n, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    normed = v * tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    if UNIT_OFFSET:
        w += 1.0
    else:  # as Llama rounds
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + row * y_row + n, (normed * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    dx, dy, x, weight, dx_row, dy_row, x_row, width, eps, UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: with n = x r, r = 1 / sqrt(mean(x²) + eps) and g = dy w,  dx = r (g - n mean(g n))."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < width
    v = tl.load(x + row * x_row + n, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1.0
    g = tl.load(dy + row * dy_row + n, mask=inside, other=0.0).to(tl.float32) * w
    r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    normed = v * r
    result = r * (g - normed * (tl.sum(g * normed, 0) / width))
    tl.store(dx + row * dx_row + n, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads"])
def _rope(
    y, x, cos, sin, y_row, y_head, x_row, x_head, cos_row, sin_row, heads,
    ROTARY: tl.constexpr, DIM: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """One row, HEADS heads: (a, b) -> (a c1 - b s1, b c2 + a s2); its transpose backward."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    half = ROTARY // 2
    in_half = i < half
    inside = (h < heads)[:, None] & in_half[None, :]
    c1 = tl.load(cos + row * cos_row + i, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + row * cos_row + half + i, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + row * sin_row + i, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + row * sin_row + half + i, mask=in_half, other=0.0).to(tl.float32)[None, :]
    source = x + row * x_row + h[:, None] * x_head
    target = y + row * y_row + h[:, None] * y_head
    a = tl.load(source + i[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half + i[None, :], mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        left = a * c1 + b * s2
        right = b * c2 - a * s1
    else:
        left = a * c1 - b * s1
        right = b * c2 + a * s2
    tl.store(target + i[None, :], left.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half + i[None, :], right.to(y.dtype.element_ty), mask=inside)
    if ROTARY < DIM:
        e = ROTARY + tl.arange(0, REST)
        inside = (h < heads)[:, None] & (e < DIM)[None, :]
        tl.store(target + e[None, :], tl.load(source + e[None, :], mask=inside, other=0.0), mask=inside)


@triton.jit
def _tanh(u):
    """The exponential may overflow to infinity, which gives 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))


@triton.jit
def _slope(g, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        return s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        return 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)


@triton.jit(do_not_specialize=["width"])
def _gated(
    y, gate, up, y_row, gate_row, up_row, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row, BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_row + n, mask=n < width, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + n, (_activation(g, ACTIVATION) * u).to(y.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["width"])
def _gated_backward(
    d_gate, d_up, dy, gate, up, d_gate_row, d_up_row, dy_row, gate_row, up_row, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_gate = dy up act'(gate),  d_up = dy act(gate)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    d = tl.load(dy + row * dy_row + n, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + n, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + n, mask=inside, other=0.0).to(tl.float32)
    to_gate = d * u * _slope(g, ACTIVATION)
    to_up = d * _activation(g, ACTIVATION)
    tl.store(d_gate + row * d_gate_row + n, to_gate.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * d_up_row + n, to_up.to(d_up.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------- launchers: two-dimensional, unit stride


def rms_norm(y: Tensor, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> None:
    """y, x [T, H]; weight [H]."""
    _rms_norm[(x.shape[0],)](
        y, x, weight, y.stride(0), x.stride(0), x.shape[1], eps,
        UNIT_OFFSET=unit_offset, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=_warps(x.shape[1]),
    )  # fmt: skip


def rms_norm_backward(dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> None:
    """dx, dy, x [T, H]; weight [H]."""
    _rms_norm_backward[(x.shape[0],)](
        dx, dy, x, weight, dx.stride(0), dy.stride(0), x.stride(0), x.shape[1], eps,
        UNIT_OFFSET=unit_offset, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=_warps(x.shape[1]),
    )  # fmt: skip


def rope(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """y, x [T, heads, D]; cos, sin [T, R]."""
    rows, heads, dim = x.shape
    rotary = cos.shape[1]
    _rope[(rows, -(-heads // _HEADS))](
        y, x, cos, sin, y.stride(0), y.stride(1), x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), heads,
        ROTARY=rotary, DIM=dim, BACKWARD=backward, HEADS=_HEADS, HALF=triton.next_power_of_2(rotary // 2),
        REST=triton.next_power_of_2(max(1, dim - rotary)),
    )  # fmt: skip


def gated(y: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """y, gate, up [T, I]."""
    rows, width = gate.shape
    _gated[(rows, -(-width // _COLUMNS))](
        y, gate, up, y.stride(0), gate.stride(0), up.stride(0), width, ACTIVATION=activation, BLOCK=_COLUMNS
    )  # fmt: skip


def gated_backward(d_gate: Tensor, d_up: Tensor, dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """All [T, I]."""
    rows, width = gate.shape
    _gated_backward[(rows, -(-width // _COLUMNS))](
        d_gate, d_up, dy, gate, up, d_gate.stride(0), d_up.stride(0), dy.stride(0), gate.stride(0), up.stride(0),
        width, ACTIVATION=activation, BLOCK=_COLUMNS,
    )  # fmt: skip


def _warps(width: int) -> int:
    """Enough of them that a thread holds at most 32 values of a row."""
    return 4 if width <= 4096 else 8 if width <= 8192 else 16
