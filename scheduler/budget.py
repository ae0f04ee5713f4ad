"""How long the next iteration may take, by the promises of those who are there and of those who may come.

It may assume nothing about what the iteration will hold. It never lets one be longer than the server's own promise
between tokens where somebody is there, or on the way in, who was promised no less.

Streams with looser promises share longer iterations: each costs one decode step, and more of it is left for training
and prompts. That ends where an interactive request which arrives meanwhile would wait too long for its first token, and
at once when one is there: it wants a place, its prompt, and then to be a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.state import RequestState


def iteration_budget(config: SchedulerConfig, now: float, decodes: Iterable[RequestState], expected: bool) -> float:
    """Seconds. `expected`: an interactive prompt is running or waiting."""
    due = [r.itl_deadline for r in decodes if r.itl_deadline is not None]
    if not due:
        return config.itl_seconds
    longest = config.itl_seconds
    if not expected:
        longest = max(longest, config.arrival_share * config.ttft_seconds)
    return min(longest, min(due) - now)
