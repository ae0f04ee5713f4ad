"""Seconds between the parts of an iteration: by the clock on a CPU, by events in the device's queue on CUDA.

On CUDA the host runs ahead of the device, and asking the clock would mean to wait. `parts` waits once, at the end.
"""

from __future__ import annotations

import itertools
import time

import torch


class Stopwatch:
    """One iteration."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._began = device, time.perf_counter()
        self._marks: list[tuple[int | str, float | torch.cuda.Event]] = [("", self._now())]

    def mark(self, part: int | str) -> None:
        """What was started since the last mark belongs to `part`."""
        self._marks.append((part, self._now()))

    @property
    def passed(self) -> float:
        """Seconds since the start, of the host."""
        return time.perf_counter() - self._began

    def parts(self) -> dict[int | str, float]:
        """Seconds of each part; waits until the device has come to the last mark."""
        last = self._marks[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        return {part: _between(a, b) for (_, a), (part, b) in itertools.pairwise(self._marks)}

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(earlier: float | torch.cuda.Event, later: float | torch.cuda.Event) -> float:
    if isinstance(earlier, torch.cuda.Event) and isinstance(later, torch.cuda.Event):
        return float(earlier.elapsed_time(later)) / 1e3
    if isinstance(earlier, float) and isinstance(later, float):
        return later - earlier
    raise TypeError("marks of two kinds")
