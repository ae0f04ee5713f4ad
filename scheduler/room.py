"""What is left while a plan is being made: K/V blocks in all and of each tenant's share, and adapters that may be used.

It may assume that a block counts for every request that holds it. A running prompt counts in its tenant's share as a
whole, so that it never has to wait for a later one. Nothing is granted that is not there: a plan made of what `Room`
gave can be carried out as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from coserve.scheduler.state import RequestState, SchedulerState

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Stock:
    """The K/V blocks that requests of one plan may count on."""

    free: int  # of nobody, with what training would give back
    kept: int = 0  # by training, for now: a request that lacks no more than these is not too large
    due: int = 0  # of these, to an adapter that waits for them: whoever runs may use them, nobody else
    closed: str | None = None  # why no prompt is admitted; None: prompts are


class Room:
    __slots__ = ("_adapters", "_limits", "_max_adapters", "_pages", "_used", "due", "free", "granted", "kept", "size")

    def __init__(self, state: SchedulerState, running: Sequence[RequestState], stock: Stock) -> None:
        self.free = stock.free  # never negative
        self.granted = 0  # blocks that were free and are no longer
        self.kept, self.due = stock.kept, stock.due
        self.size = state.block_size
        self._max_adapters = state.max_adapters
        self._limits = state.limits
        self._used: dict[str, int] = {}  # tenant -> blocks, where there is a limit
        # In use, in the order in which they came up.
        self._adapters = dict.fromkeys([r.adapter for r in running if r.adapter is not None])
        self._pages: dict[str, dict[str, int]] = {}  # tenant -> its adapters in use and their pages, likewise
        if self._limits:
            for r in running:
                self.claim(r, self._of_share(r))
                self.use(r)

    # ------------------------------------------------------------------ blocks

    def needed(self, request: RequestState, tokens: int) -> int:
        """Blocks that `request` lacks for its first `tokens` tokens."""
        lack = -(-tokens // self.size) - request.blocks_held
        return lack if lack > 0 else 0

    def tokens(self, request: RequestState) -> int:
        """Tokens that a running prompt can run with its own blocks and all free ones."""
        return (request.blocks_held + self.free) * self.size - request.computed_tokens

    def take(self, request: RequestState, tokens: int) -> None:
        """The blocks that `request` lacks for its first `tokens` tokens are no longer free."""
        blocks = self.needed(request, tokens)
        self.free -= blocks
        self.granted += blocks

    def claim(self, request: RequestState, blocks: int) -> None:
        """Count `blocks` more in the share of the request's tenant."""
        if request.tenant in self._limits:
            self._used[request.tenant] = self._used.get(request.tenant, 0) + blocks

    def give_back(self, request: RequestState) -> None:
        """A running request gives up its blocks; those that others hold too stay taken."""
        self.free += request.blocks_held - request.blocks_shared
        self.claim(request, -self._of_share(request))

    def share(self, tenant: str) -> int:
        """The most blocks that a tenant may hold."""
        limit = self._limits.get(tenant)
        return _NO_LIMIT if limit is None or limit.blocks is None else limit.blocks

    def left_of_share(self, tenant: str) -> int:
        return max(0, self.share(tenant) - self._used.get(tenant, 0))

    def _of_share(self, request: RequestState) -> int:
        return request.blocks_held + self.needed(request, request.total_tokens) * (not request.decoding)

    # ------------------------------------------------------------------ adapters

    def wakes(self, request: RequestState) -> int:
        """Blocks that count as free and are its idle adapter's once it runs."""
        return 0 if request.adapter in self._adapters else request.blocks_adapter

    def use(self, request: RequestState) -> None:
        if request.adapter is not None:
            self.free -= self.wakes(request)
            self._adapters[request.adapter] = None
            if request.tenant in self._limits:
                self._pages.setdefault(request.tenant, {})[request.adapter] = request.adapter_pages

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def has_place(self, adapter: str, claimed: str | None) -> bool:
        """Whether the pool holds this adapter, the one that is claimed, and those in use."""
        new = int(adapter not in self._adapters)
        if claimed is not None and claimed != adapter:
            new += claimed not in self._adapters
        return len(self._adapters) + new <= self._max_adapters

    def has_pages(self, request: RequestState) -> bool:
        """Whether its adapter fits its tenant's share of the pool; the tenant's only one always does."""
        limit, used = self._limits.get(request.tenant), self._pages.get(request.tenant, {})
        if limit is None or limit.adapter_pages is None or request.adapter is None or request.adapter in used:
            return True
        return not used or sum(used.values()) + request.adapter_pages <= limit.adapter_pages


def wanted_adapters(
    in_use: Iterable[str], ahead: Iterable[RequestState], others: Iterable[RequestState], most: int
) -> tuple[str, ...]:
    """Adapters that ought to be on the device, at most `most`: those in use first, then those of `ahead`."""
    wanted: dict[Any, None] = {None: None, **dict.fromkeys(in_use)}  # None: of the base model
    for r in chain(ahead, others):
        adapter = r.adapter
        if adapter not in wanted:
            if len(wanted) > most:
                break
            wanted[adapter] = None
    del wanted[None]
    return tuple(wanted)[:most]
