"""What may go wrong while a simulation runs. Plain data: the run carries it out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Iterations that begin in [at, at + seconds) take `factor` times as long."""

    at: float
    seconds: float
    factor: float


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """`share` of the K/V blocks are not there in [at, at + seconds), as far as nobody holds them then."""

    at: float
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Restart:
    """The engine dies at the end of the iteration under way and is back `down` seconds later, knowing only what its
    calibration tells it. Streams that had a token end; the others are sent again; jobs redo the step under way."""

    at: float
    down: float


Fault = Slowdown | MemoryPressure | Restart
