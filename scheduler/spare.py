"""The K/V blocks that prompts which wait may have: what is free, less what those that run still need.

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
        self._whole, self._size = room.free + room.granted, room.size
        self._left = room.free - sum(room.needed(r, r.total_tokens) for r in prompts)
        self.reserve = 0 if outputs.known else ceil(config.decode_reserve * len(self._running))
        self._forecast: Forecast | None = None

    def admit(self, request: RequestState, need: int, idle: bool) -> bool:
        """Whether a prompt that needs so many blocks may join, which it then has. `idle`: they are free and nobody else
        runs, so nothing could keep it out."""
        if not idle and not self._fits(request, need):
            return False
        self._left -= need
        self._running.append(request)
        return True

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
        return self._forecast.admit(request)
