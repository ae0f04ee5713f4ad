"""Time and memory of a device: CUDA events and the allocator's counts on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Clock:
    """Marks between which the device's work is timed."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Behind everything that was launched so far."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Of the stretches between neighbouring marks; waits for the last one."""
        pairs = itertools.pairwise(marks)
        if not self._cuda:
            return [after - before for before, after in pairs]
        marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]

    def median(self, run: Callable[[int], object], times: int, warm: int = 2) -> float:
        """Median seconds of `run(number)`, after `warm` runs that do not count."""
        for number in range(warm):
            run(number)
        marks = [self.mark()]
        for number in range(times):
            run(number)
            marks.append(self.mark())
        return statistics.median(self.seconds(marks))


class Memory:
    """Bytes that torch has allocated on a GPU; all None on a CPU, where nothing counts them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def held(self) -> int | None:
        return torch.cuda.memory_allocated() if self._cuda else None

    def peak(self) -> int | None:
        """The most since `reset`."""
        return torch.cuda.max_memory_allocated() if self._cuda else None

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def release(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
