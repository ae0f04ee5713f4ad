"""A table while it grows: rows, figures and aims, in a file after each of them, so that a killed run loses nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from harness import Report

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure and the bound it should keep: at most `bound`, or at least. It is missed where memory `ran_out`."""

    what: str
    value: float | None
    bound: float
    at_least: bool = False
    ran_out: bool = False

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if self.value is None:
            return False if self.ran_out else None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        said = {True: "met", False: "missed", None: "not measured"}[self.met]
        nothing = OUT_OF_MEMORY if self.ran_out else "–"
        value = nothing if self.value is None else f"{self.value:.3g}"
        return f"- {self.what}: {value}, aim {sign} {self.bound:g}: {said}"


class Results:
    """All tables of a run, in one JSON file that is whole at any time."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.document: dict[str, Any] = {"tables": {}}

    def put(self, name: str, table: dict[str, Any]) -> None:
        self.document["tables"][name] = table
        self.save()

    def save(self) -> None:
        if self._file is None:
            return
        part = self._file.with_name(f".{self._file.name}.part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(part, self._file)


@dataclass
class Table:
    """One table of a run; it is timed from here on."""

    name: str
    title: str
    columns: Sequence[str]
    facts: dict[str, str]
    results: Results
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    aims: list[Aim] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.save()

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.save()

    def row(self, *cells: object) -> None:
        self.rows.append(cells)
        self.save()

    def lack(self, *labels: object) -> None:
        """A row without figures: memory ran out."""
        self.row(*labels, OUT_OF_MEMORY, *[None] * (len(self.columns) - len(labels) - 1))

    def aim(
        self, what: str, value: float | None, bound: float, *, at_least: bool = False, ran_out: bool = False
    ) -> None:
        """`ran_out`: there is no value because memory ran out where it was to be measured."""
        self.aims.append(Aim(what, value, bound, at_least, ran_out))
        self.save()

    def save(self, *, complete: bool = False) -> None:
        aims = [{**asdict(aim), "met": aim.met} for aim in self.aims]
        self.results.put(
            self.name,
            {"title": self.title, "machine": self.facts, "complete": complete,
             "seconds": round(time.monotonic() - self.began, 1), "columns": list(self.columns),
             "rows": [list(row) for row in self.rows], "notes": self.notes, "aims": aims, **self.figures},
        )  # fmt: skip

    def finish(self) -> None:
        """Print it; from here on the file calls it complete."""
        self.save(complete=True)
        show(self.results.document["tables"][self.name])


def show(document: dict[str, Any]) -> None:
    """Print a table as it stands in a results file."""
    aims = [Aim(*(aim[field.name] for field in fields(Aim))) for aim in document["aims"]]
    notes = list(document["notes"])
    if aims:
        notes.append("\n".join(map(str, aims)))
    notes.append(f"It took {document['seconds']:.0f} s.")
    if not document["complete"]:
        notes.append("The run was ended before this table was complete.")
    report = Report(document["title"], document["columns"], document["machine"], document["rows"], notes)
    report.emit(None)
    print()
