"""The sizes that a training window may be cut to beside inference, the largest first.

Few of them, so that shapes repeat; and none so small that it costs as much as a larger one.
"""

from __future__ import annotations


class Cuts:
    """Nothing below `least` rows, but for windows that are smaller themselves. Each window's are worked out once."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._fine: dict[int, tuple[int, ...]] = {}
        self._powers: dict[int, tuple[int, ...]] = {}

    def fine(self, whole: int) -> tuple[int, ...]:
        """Of a unit: `whole`, then the multiples of 32 below it, then 16 and 8."""
        sizes = self._fine.get(whole)
        if sizes is None:
            small = (n for n in (16, 8) if self._least <= n < whole)
            sizes = self._fine[whole] = (whole, *range((whole - 1) // 32 * 32, 31, -32), *small)
        return sizes

    def powers(self, whole: int) -> tuple[int, ...]:
        """Of a ride: `whole`, then the powers of two below it."""
        sizes = self._powers.get(whole)
        if sizes is None:
            below = (1 << n for n in range((whole - 1).bit_length() - 1, -1, -1))
            sizes = self._powers[whole] = (whole, *(n for n in below if self._least <= n))
        return sizes
