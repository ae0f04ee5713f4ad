"""What the device can do at best, measured in the same run: bytes a second of a copy, FLOP a second of a product."""

from __future__ import annotations

import torch

from gpu_tables.clock import Clock

_BUFFERS = 3  # taken in turn, so that no cache serves the next run


def copy_rate(device: torch.device, *, large: bool) -> float:
    """Bytes read and written a second, by copies of 2 GiB (8 MiB on a CPU)."""
    count = (2 << 30 if large else 8 << 20) // 4
    pairs = [(torch.randn(count, device=device), torch.empty(count, device=device)) for _ in range(_BUFFERS)]

    def copy(number: int) -> None:
        source, target = pairs[number % _BUFFERS]
        target.copy_(source)

    return 2 * 4 * count / Clock(device).median(copy, 12, warm=_BUFFERS)


def product_rate(device: torch.device, dtype: torch.dtype, *, large: bool) -> float:
    """FLOP a second of square products of random matrices, 8192 (256 on a CPU) a side."""
    side = 8192 if large else 256
    pairs = [[torch.randn(side, side, device=device).to(dtype) for _ in range(2)] for _ in range(_BUFFERS)]
    out = torch.empty(side, side, device=device, dtype=dtype)

    def multiply(number: int) -> None:
        torch.matmul(*pairs[number % _BUFFERS], out=out)

    return 2 * side**3 / Clock(device).median(multiply, 12, warm=_BUFFERS)
