"""Where the time of a few iterations goes: kernels by their share, and how much of the time the device was busy at all.

On a CPU operators stand for kernels. The profiler slows the host down: the busy seconds are right, the wall's are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_SHOWN = 12


def breakdown(device: torch.device, run: Callable[[], object], times: int) -> dict[str, Any]:
    """Of one of `times` runs: "busy" seconds, "launches", and "top": [name, seconds, launches], the longest first."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    spent = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / times, event.count)
        for event in profiled.key_averages()
    ]
    spent = sorted((e for e in spent if e[1] > 0), key=lambda e: -e[1])
    return {
        "busy": sum(seconds for _, seconds, _ in spent),
        "launches": sum(count for *_, count in spent) / times,
        "top": [[name[:90], seconds, count / times] for name, seconds, count in spent[:_SHOWN]],
    }


def in_words(what: str, found: dict[str, Any], seconds: float) -> str:
    """One line beside the time that was measured without the profiler."""
    top = "; ".join(f"{name.split('(')[0][:40]} {1e3 * s:.3g} ms in {n:.0f}" for name, s, n in found["top"][:4])
    busy = f"{1e3 * found['busy']:.3g} of {1e3 * seconds:.3g} ms, {found['launches']:.0f} launches"
    return f"{what}: the device is busy {busy}. Most of it: {top}."
