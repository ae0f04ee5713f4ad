"""What can be wrong with a line of a data set, in words that its author can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 20  # faults that are kept and shown; the others are only counted


@dataclass(frozen=True, slots=True)
class Fault:
    line: int  # 1-based; 0 for the file as a whole
    field: str | None  # "messages[1].content", None for the line as a whole
    reason: str
    remedy: str

    def __str__(self) -> str:
        place = f"Line {self.line}" if self.line else "File"
        return f"{place}{f', field {self.field}' if self.field else ''}: {self.reason}. {self.remedy}"


class RowFault(Exception):
    """A line that cannot be used; `read_rows` and `prepare_dataset` add its number."""

    def __init__(self, field: str | None, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason
        self.remedy = remedy

    def at(self, line: int) -> Fault:
        return Fault(line, self.field, self.reason, self.remedy)


def check_text(value: str, name: str) -> None:
    """Refuse what is no text. Raises RowFault."""
    if "\0" in value:
        raise RowFault(name, "the text holds a NUL character", "Remove it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(name, "the text holds half of a surrogate pair", "Write whole characters.") from None


def describe(faults: Sequence[Fault], total: int) -> str:
    """One text for the job's error: a line a fault, and how many more there are."""
    lines = [str(fault) for fault in faults]
    if total > len(faults):
        lines.append(f"… and {total - len(faults)} more.")
    return "\n".join(lines)
