"""The elementwise rest of a decoder layer: plain torch on a CPU, Triton on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from coserve.kernels.layer import reference
from coserve.kernels.layer.reference import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """x [..., H] / sqrt(mean(x²) + eps), times weight [H] (Llama) or 1 + weight (`unit_offset`, Gemma)."""
    return _for(x).rms_norm(x, weight, eps, unit_offset=unit_offset)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by tables cos, sin [T, R], column i with i + R / 2; columns from R on unchanged."""
    return _for(x).rope(x, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, of one shape."""
    return _for(gate).gated(gate, up, activation)


def _for(x: Tensor) -> Any:
    if not x.is_cuda:
        return reference
    # Here and not above: an installation without a GPU has no Triton.
    from coserve.kernels.layer import function

    return function
