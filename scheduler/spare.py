"""The blocks that prompts which wait may have: what is free, less what those that run still need, and less what an
adapter waits for.

It may assume that running prompts take what they need before those that wait. While too little is known of outputs, a
fixed part of a block is left for every running request; after that, what the forecast says (`outputs`). Its answers
bound who joins; that there are blocks for a plan's rows is `room`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.outputs import Forecast, Outputs
from coserve.scheduler.room import Room
from coserve.scheduler.state import RequestState


class Spare:
    """Of one plan, before any prompt has its chunk. `prompts`: those of `running` that are not in decode."""

    def __init__(self, config: SchedulerConfig, outputs: Outputs, room: Room, running: Iterable[RequestState],
                 prompts: Iterable[RequestState]) -> None:  # fmt: skip
        self._outputs, self._running = outputs, list(running)
        self._room, self._due, self._size = room, room.due, room.size
        self._whole = room.free + room.granted - room.due
        self._left = room.free - room.due - sum(room.needed(r, r.total_tokens) for r in prompts)
        self.reserve = 0 if outputs.known else ceil(config.decode_reserve * len(self._running))
        self._forecast: Forecast | None = None

    def admit(self, request: RequestState, need: int, idle: bool) -> bool:
        """Whether a prompt that needs so many blocks, those of an adapter that it wakes among them, may join, which it
        then has. `idle`: nobody else runs, so nothing but the adapter that waits could keep it out."""
        if not self._joins(request, need, idle):
            return False
        self._left -= need
        self._whole -= self._room.wakes(request)
        self._running.append(request)
        return True

    def is_due(self, request: RequestState, need: int, idle: bool) -> bool:
        """Whether a prompt that may not join would but for the adapter that waits. To be asked last."""
        due, self._due, self._forecast = self._due, 0, None
        self._left, self._whole = self._left + due, self._whole + due
        return due > 0 and self._joins(request, need, idle)

    def _joins(self, request: RequestState, need: int, idle: bool) -> bool:
        return (idle and need <= self._room.free - self._due) or self._fits(request, need)

    def _fits(self, request: RequestState, need: int) -> bool:
        if need > self._left - self.reserve:
            return False
        if not self._outputs.known:
            return True
        if self._forecast is None:
            growth = (1 + len(self._running)) * self._outputs.longest // self._size
            if need + growth <= self._left:
                return True  # even if all went on to the longest output known
            self._forecast = self._outputs.forecast(self._running, self._whole, self._size)
        return self._forecast.admit(request, self._room.wakes(request))
