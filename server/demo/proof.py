"""Evidence from the engine's own records that generation and training ran in the same iterations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

POLL_RECORDS = 1000  # of the 2,000 that the server keeps


@dataclass(frozen=True, slots=True)
class Shared:
    """Iterations of the engine by what they carried, and who ran them."""

    iterations: int
    decode_and_forward: int  # decode tokens and training tokens in one packed forward
    decode_and_backward: int  # decode tokens, and backward units after the same forward
    in_promise: int  # of those with a stream: inside the inter-token promise
    with_streams: int
    engine_pids: frozenset[int]


class IterationRecords:
    """Collects records from overlapping pages; each iteration counts once."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, int], Mapping[str, Any]] = {}

    def add(self, page: Iterable[Mapping[str, Any]]) -> None:
        """The `data` of one answer of the iterations route."""
        for record in page:
            self._records[record["engine_pid"], record["seq"]] = record

    def summary(self, start: float, end: float) -> Shared:
        """Of the iterations that started in [start, end), in seconds of the wall clock."""
        return summarise(record for record in self._records.values() if start <= record["started_at"] < end)


def summarise(records: Iterable[Mapping[str, Any]]) -> Shared:
    """Count the records; each is as the iterations route shows it."""
    kept = list(records)
    decoding = [record for record in kept if record["tokens"]["decode"] > 0]
    return Shared(
        iterations=len(kept),
        decode_and_forward=sum(record["tokens"]["train_forward"] > 0 for record in decoding),
        decode_and_backward=sum(record["tokens"]["train_backward"] > 0 for record in decoding),
        in_promise=sum(record["measured_s"] <= record["slo_budget_s"] for record in decoding),
        with_streams=len(decoding),
        engine_pids=frozenset(record["engine_pid"] for record in kept),
    )
