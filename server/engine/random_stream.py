"""Random numbers as a function of what they are for: no state, so no order of calls can change them.

The mixing function is the finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), applied once a key part.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def counter_bits(*key: int) -> int:
    """64 bits, a function of the integers of `key` (each taken modulo 2**64) and their order."""
    bits = 0
    for part in key:
        bits = _mix(((bits ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return bits


def uniform(seed: int, choice: int, position: int) -> float:
    """The draw of one token: strictly between 0 and 1, a multiple of 2**-53."""
    return ((counter_bits(seed, choice, position) >> 12) + 0.5) * 2.0**-52
