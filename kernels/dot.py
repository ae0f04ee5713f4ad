"""The product of two tiles, as every kernel here takes it: sums in float32, on the matrix unit where the dtype has one.

Imports Triton: for CUDA tensors, or under its interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(left, right, WIDEN: tl.constexpr):
    """left @ right in float32. The interpreter multiplies bfloat16's bits as integers: WIDEN there."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")


INTERPRETED = not isinstance(dot, triton.JITFunction)
