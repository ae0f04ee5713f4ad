"""What the scheduler is told: the books as they stand, or as they will stand after the iteration under way.

What is expected of that: all rows run, no stream meets a stop token, nobody comes, leaves or fails. Sweeps need no
guess, as their books are written when their work is queued. Nothing here changes anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from coserve.scheduler.state import Plan, RequestState, SchedulerState
from coserve.server.engine.adapters import AdapterBook
from coserve.server.engine.requests import Request, RequestBook
from coserve.server.engine.shares import Shares
from coserve.server.engine.trainer import Trainer


class Outlook:
    def __init__(
        self, requests: RequestBook, adapters: AdapterBook, trainer: Trainer, shares: Shares, max_running: int,
        max_adapters: Callable[[], int],
    ) -> None:  # fmt: skip
        self._requests, self._adapters, self._trainer, self._shares = requests, adapters, trainer, shares
        self._max_running, self._max_adapters = max_running, max_adapters

    def now(self) -> SchedulerState:
        """As things stand."""
        now = time.monotonic()
        return self._state(now, tuple(map(self._request, self._requests)), self._requests.blocks.free_blocks)

    def after(self, plan: Plan, state: SchedulerState, rows: Mapping[str, int]) -> SchedulerState:
        """As things will stand after `plan`, made for `state`, which is under way with `rows` rows of requests by id.

        The iteration may take its upper estimate, and the next plan comes as late after the tokens as this one did.
        """
        decodes = set(plan.decodes)
        told = [r.last_token_at for r in self._requests if r.id in decodes and r.last_token_at is not None]
        delay = state.now - max(told, default=state.now)
        delivered = state.now + plan.upper_seconds
        expected = [(r, self._expected(r, rows.get(r.id, 0), delivered)) for r in self._requests]
        ending = [r for r, seen in expected if not seen]
        free = self._requests.blocks.free_blocks + sum(map(self._requests.own_blocks, ending))
        free += self._adapters.freed_by(r.message.adapter for r in ending if r.acquired and r.message.adapter)
        free += self._trainer.live.ending_blocks
        return self._state(delivered + delay, tuple(seen for _, seen in expected if seen), free)

    def _state(self, now: float, requests: tuple[RequestState, ...], free_blocks: int) -> SchedulerState:
        return SchedulerState(
            now=now,
            requests=requests,
            sweeps=self._trainer.states(),
            free_blocks=free_blocks,
            block_size=self._requests.blocks.block_size,
            max_running=self._max_running,
            max_adapters=self._max_adapters(),
            limits=self._shares.limits,
            activation_blocks=self._trainer.live.most_blocks,
            adapter_blocks=max(self._adapters.lacks, self._trainer.lacks),
        )

    def _request(self, request: Request) -> RequestState:
        message = request.message
        return self._requests.state(
            request, self._shares.weight(message.tenant), self._adapters.ready(message.adapter),
            self._adapters.pages(message.adapter), self._adapters.kept_out(message.adapter),
            self._adapters.blocks(message.adapter),
        )  # fmt: skip

    def _expected(self, request: Request, rows: int, delivered: float) -> RequestState | None:
        """A request once `rows` more of its tokens have run; None if its last token comes with them."""
        seen = self._request(request)
        computed = seen.computed_tokens + rows
        if not rows or computed < seen.total_tokens:
            return replace(seen, computed_tokens=computed) if rows else seen
        if seen.output_tokens + 1 >= request.message.sampling.max_tokens:
            return None
        return replace(
            seen, computed_tokens=computed, total_tokens=seen.total_tokens + 1, output_tokens=seen.output_tokens + 1,
            itl_deadline=delivered + self._requests.promises(request)[0],
        )  # fmt: skip
