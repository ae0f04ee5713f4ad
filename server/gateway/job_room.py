"""When a job that paused for lack of room on the disk goes on by itself. Reads no clock and no disk.

Two marks keep it from going to and fro: it pauses when a write finds no room, and goes on when there is clearly more
than it writes at once. If it pauses again before its next checkpoint, it waits longer each time, whatever the disk
says: a quota does not show in the free bytes.
"""

from __future__ import annotations

MARGIN_BYTES = 64 * 1024**2
FIRST_WAIT, LONGEST_WAIT = 10.0, 600.0  # seconds, before the second try and between late ones


def room_wanted(needed: int) -> int:
    """Free bytes with which a job that writes `needed` bytes at once goes on."""
    return 2 * needed + MARGIN_BYTES


class RoomWait:
    """The jobs that wait for room, as long as the gateway lives. Times are the caller's seconds."""

    def __init__(self, first_wait: float = FIRST_WAIT) -> None:
        self._first_wait = first_wait
        self._waits: dict[str, tuple[float, float]] = {}  # job -> (not before, the wait after the next pause)

    def paused(self, job_id: str, now: float) -> None:
        """It found no room. The first time it may try again as soon as there is some."""
        known = self._waits.get(job_id)
        wait = known[1] if known is not None else 0.0
        self._waits[job_id] = now + wait, min(max(2 * wait, self._first_wait), LONGEST_WAIT)

    def wrote(self, job_id: str) -> None:
        """It has stored a checkpoint: there was room."""
        self._waits.pop(job_id, None)

    def may_go_on(self, job_id: str, needed: int, free: int, now: float) -> bool:
        not_before, _ = self._waits.get(job_id, (now, 0.0))
        return free >= room_wanted(needed) and now >= not_before
