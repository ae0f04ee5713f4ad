"""Counter-based dropout: the mask of a row is a function of (job seed, step, sequence, position, module, column).

However the rows are cut into windows, whatever shares the batch and however often a row is run, its mask is the
same. The generator is 32-bit integer mixing (multiply, xor, shift), which torch and a Triton kernel can both do
in int64 without loss; a keyed hash of that size is ample for dropout and no source of secrets.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.kernels.transfer import to_device

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Which rows of which sequences stand in a segment."""

    sequence: Tensor  # int64 [T] number of the row's sequence in its step
    position: Tensor  # int64 [T] position in that sequence

    @staticmethod
    def of(runs: Sequence[tuple[int, int, int]], device: torch.device | str = "cpu") -> RowKeys:
        """runs: (sequence number, first position, rows). One copy to the device, no synchronisation."""
        sequence = torch.cat([torch.full((n,), number, dtype=torch.int64) for number, _, n in runs])
        position = torch.cat([torch.arange(first, first + n, dtype=torch.int64) for _, first, n in runs])
        both = to_device(torch.stack([sequence, position]), device)
        return RowKeys(both[0], both[1])


def dropout_rows(x: Tensor, rate: float, step_key: tuple[int, int], module: str, keys: RowKeys) -> Tensor:
    """x [T, C] with a share `rate` of its elements zeroed and the rest divided by 1 - rate. Differentiable in x."""
    seed, step = step_key
    base = _mix_int(_mix_int(seed & _MASK, step), zlib.crc32(module.encode()))
    rows = _mix(_mix(keys.sequence + base) ^ keys.position)
    columns = torch.arange(x.shape[1], dtype=torch.int64, device=keys.position.device)
    uniform = _mix(_mix(rows[:, None] + columns[None, :] * 0x9E3779B1))  # [T, C] in [0, 2**32)
    kept = (uniform >= int(rate * 2**32)).to(x.device)
    return x * kept.to(x.dtype) / (1.0 - rate)


def _mix(h: Tensor) -> Tensor:
    """One round of 32-bit finalising mix (the constants of MurmurHash3's finaliser)."""
    h = h & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def _mix_int(a: int, b: int) -> int:
    h = (a * 0x9E3779B1 + b) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    return h ^ (h >> 13)
