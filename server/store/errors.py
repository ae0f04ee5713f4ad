"""What the store raises. An unknown or foreign id is never an error here: lookups answer None for both alike."""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything that the store raises on purpose."""


class StoreUnavailable(StoreError):
    """The database cannot be opened, read or written; the message says what to do."""


class StorageFull(StoreUnavailable):
    """The disk, or the database's size limit, is exhausted. Nothing of the operation was kept."""


class AlreadyExists(StoreError):
    """A name that must be unique is taken."""


class UnknownCursor(StoreError):
    """`after` names nothing in this list."""

    def __init__(self, after: str) -> None:
        super().__init__(f"after={after!r} names no object of this list; leave it out to start at the newest.")
        self.after = after


class InvalidTransition(StoreError):
    """A job cannot go from its status to the one asked for."""

    def __init__(self, job_id: str, current: str, wanted: str) -> None:
        super().__init__(f"Job {job_id} is {current} and cannot become {wanted}.")
        self.job_id = job_id
        self.current = current
        self.wanted = wanted


class EventGap(StoreError):
    """A job event arrived before the one that precedes it; read the job's event file from `expected` on."""

    def __init__(self, job_id: str, expected: int, got: int) -> None:
        super().__init__(f"Job {job_id}: event {got} arrived, {expected} is next; apply the events in order.")
        self.job_id = job_id
        self.expected = expected
        self.got = got


class IdempotencyConflict(StoreError):
    """An idempotency key was used before with another request body."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Idempotency key {key!r} was used with another request body; send a new key.")
        self.key = key
