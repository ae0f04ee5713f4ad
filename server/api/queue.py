"""What of the caller's waits for its first token: the place in the queue, the reason, and how long it may take."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf
from coserve.server.api.lists import list_object
from coserve.server.gateway.waiting import Waiting

router = APIRouter(prefix="/v1/coserve/queue", tags=["service"])


@router.get("")
async def list_waiting(caller: Caller, services: ServicesOf) -> dict[str, Any]:
    """The caller's sequences without a first token, the next one first, as of the engine's last report."""
    return list_object([waiting_object(one) for one in services.engine.queue(caller.tenant)], has_more=False)


def waiting_object(waiting: Waiting) -> dict[str, Any]:
    request_id, _, choice = waiting.request_id.partition("/")
    return {
        "id": request_id,
        "object": "coserve.queued_sequence",
        "index": int(choice or 0),
        "position": waiting.position,
        "reason": waiting.reason,
        "expected_wait_seconds": None if waiting.seconds is None else round(waiting.seconds, 3),
    }
