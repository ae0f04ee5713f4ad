"""Why the gateway's services say no, without a word about HTTP: the API turns each kind into its status."""

from __future__ import annotations


class Refused(Exception):
    """The request cannot be carried out; `message` is for people, `code` for programs, `param` names what is wrong."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


class Invalid(Refused):
    """It can never be right."""


class NotFound(Refused):
    """The tenant has no such thing, whether or not another tenant has."""


class Conflict(Refused):
    """Right in itself, but not in the state that the object is in."""


class QueueFull(Refused):
    """Too much of this tenant is waiting already."""


class Unavailable(Refused):
    """Something that the request needs is away or full for now."""
