"""What of a tenant's waits for its first token, told from the gateway's sequences and the engine's latest report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coserve.server.gateway.engine_sequence import EngineSequence
from coserve.server.wire.messages import Stats


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence without a token. Its place among all that wait in the engine; None once it is on its way."""

    request_id: str
    position: int | None
    reason: str
    seconds: float | None  # expected


def waiting(sequences: Iterable[EngineSequence], report: Stats | None, tenant: str) -> list[Waiting]:
    """The tenant's, the next one first; `report` None: there is no engine."""
    queued = {q.request_id: q for q in report.queued} if report is not None else {}
    found = []
    for sequence in sequences:
        if sequence.started or sequence.message.tenant != tenant:
            continue
        known, name = queued.get(sequence.wire_id), sequence.message.request_id
        if known is not None:
            found.append(Waiting(name, known.position, known.reason, known.wait_seconds))
        elif report is None:
            found.append(Waiting(name, None, "waiting for the engine", None))
        else:
            found.append(Waiting(name, None, "its prompt is being computed", None))
    return sorted(found, key=lambda one: one.position or 0)
