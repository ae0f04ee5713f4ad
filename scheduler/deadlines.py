"""Requests past their deadline: every plan names them to be ended, and gives them nothing.

It may assume that whoever carries the plan out ends them before the iteration. What they hold counts as free only once
a state says so: blocks that they share with others would be counted wrongly here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coserve.scheduler.state import SchedulerState


@dataclass(frozen=True, slots=True)
class Expired:
    """`ids`: who is to be ended; `release`: whether any of them holds blocks, which the next state has."""

    ids: tuple[str, ...] = ()
    release: bool = False


def without_expired(state: SchedulerState) -> tuple[SchedulerState, Expired]:
    """The state as it is without the requests whose deadline has come, and those."""
    now = state.now
    late = [r for r in state.requests if r.deadline is not None and r.deadline <= now]
    if not late:
        return state, Expired()
    left = tuple(r for r in state.requests if r.deadline is None or r.deadline > now)
    return replace(state, requests=left), Expired(tuple(r.request_id for r in late), any(r.blocks_held for r in late))
