"""The one table of a finetuning job's statuses. Nothing else decides what may follow what."""

from __future__ import annotations

from types import MappingProxyType

from coserve.server.store.errors import InvalidTransition

VALIDATING = "validating_files"
QUEUED = "queued"
RUNNING = "running"
PAUSED = "paused"
SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELLED = "cancelled"

FINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})

NEXT = MappingProxyType(
    {
        VALIDATING: frozenset({QUEUED, FAILED, CANCELLED}),
        QUEUED: frozenset({RUNNING, PAUSED, FAILED, CANCELLED}),
        RUNNING: frozenset({QUEUED, PAUSED, SUCCEEDED, FAILED, CANCELLED}),
        PAUSED: frozenset({QUEUED, RUNNING, FAILED, CANCELLED}),
        SUCCEEDED: frozenset(),
        FAILED: frozenset(),
        CANCELLED: frozenset(),
    }
)


def may_become(current: str, wanted: str) -> bool:
    """Whether a job may go from `current` to `wanted`; to stay as it is is always allowed."""
    return wanted == current or wanted in NEXT[current]


def check_transition(job_id: str, current: str, wanted: str) -> None:
    """Raises InvalidTransition unless the job may go, or stay, there."""
    if not may_become(current, wanted):
        raise InvalidTransition(job_id, current, wanted)
