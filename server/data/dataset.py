"""A JSONL data set, checked line by line and written as tokens; or the faults that keep it from being trained on.

Blocking work for a thread: minutes for a large file. It reads one line at a time and can be stopped between two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coserve.server.data.faults import SHOWN, Fault, RowFault, describe
from coserve.server.data.formats import RowEncoder
from coserve.server.data.jsonl import read_rows
from coserve.server.data.token_file import token_file_writer
from coserve.server.data.token_row import TokenRow


class Stopped(Exception):
    """`should_stop` said so."""


@dataclass(frozen=True, slots=True)
class DatasetReport:
    format: str | None  # "chat" | "completion" | "text" | "tokens"; None if no row was readable
    rows: int
    tokens: int
    loss_tokens: int
    longest: int  # tokens of the longest row, after cutting
    cut_rows: int  # rows that were cut at `max_length`
    faults: tuple[Fault, ...]  # the first 20
    fault_count: int

    @property
    def ok(self) -> bool:
        return self.fault_count == 0

    def error_message(self) -> str:
        """All shown faults, a line each; for `error.message` of a failed job."""
        return describe(self.faults, self.fault_count)


@dataclass(slots=True)
class _Tally:
    format: str | None = None
    loss_tokens: int = 0
    longest: int = 0
    cut_rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    fault_count: int = 0

    def add(self, fault: Fault) -> None:
        self.fault_count += 1
        if len(self.faults) < SHOWN:
            self.faults.append(fault)


def prepare_dataset(
    source: Path,
    destination: Path,
    encoder: RowEncoder,
    *,
    max_model_len: int,
    max_length: int | None = None,
    scratch: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> DatasetReport:
    """Check `source` and, if no line is at fault, write its tokens to `destination`.

    Rows longer than `max_length` tokens are cut there and counted; without it a row longer than the model's context
    is a fault. Scratch files are made, unnamed, in the folder `scratch`. Raises Stopped, and OSError for the disk.
    """
    limit = min(max_length or max_model_len, max_model_len)
    tally = _Tally()
    with source.open("rb") as stream, token_file_writer(scratch) as writer:
        for line, row in read_rows(stream):
            if should_stop():
                raise Stopped
            try:
                tokens = _encode(row, encoder, tally)
                if len(tokens.ids) > limit:
                    tokens = _shorten(tokens, limit, max_length)
                    tally.cut_rows += 1
                if tokens.loss_tokens == 0:
                    raise RowFault(None, "no token of the row bears loss", "Give it an answer to learn, or remove it.")
            except RowFault as fault:
                tally.add(fault.at(line))
                continue
            tally.loss_tokens += tokens.loss_tokens
            tally.longest = max(tally.longest, len(tokens.ids))
            if not tally.fault_count:
                writer.add(tokens)
        if tally.format is None and not tally.fault_count:
            tally.add(Fault(0, None, "the file has no rows", "Upload one JSON object a line."))
        if not tally.fault_count:
            writer.save(destination)
        return DatasetReport(
            tally.format, writer.rows, writer.tokens, tally.loss_tokens, tally.longest, tally.cut_rows,
            tuple(tally.faults), tally.fault_count,
        )  # fmt: skip


def _encode(row: dict[str, Any] | RowFault, encoder: RowEncoder, tally: _Tally) -> TokenRow:
    if isinstance(row, RowFault):
        raise row
    format_, tokens = encoder.encode(row)
    if tally.format is None:
        tally.format = format_
    elif tally.format != format_:
        raise RowFault(None, f"a {format_} row in a file of {tally.format} rows", "Use one format in a file.")
    return tokens


def _shorten(tokens: TokenRow, limit: int, max_length: int | None) -> TokenRow:
    if max_length is None:
        raise RowFault(
            None,
            f"the row has {len(tokens.ids)} tokens, the model's context is {limit}",
            "Shorten it, or set training.max_length to have rows cut.",
        )
    short = tokens.cut(limit)
    if short.loss_tokens == 0 and tokens.loss_tokens:
        raise RowFault(
            None,
            f"nothing to learn is left of the row's {len(tokens.ids)} tokens when it is cut at {limit}",
            "Raise training.max_length, or shorten what comes before the answer.",
        )
    return short
