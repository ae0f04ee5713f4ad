"""Which generation requests may run now: decodes, preemptions, and the queue of prompts that may be chunked.

It may assume that requests come in order of arrival and that blocks nobody holds count as free. It never looks at
predicted time (the planner cuts the prompts' chunks) and never plans more blocks than there are.

Order. Interactive requests come before batch ones, within a class the older first; a batch request whose first token
is overdue counts as interactive, and so do all batch requests before it, so that a class stays first come first served.

Decodes. All running decodes run. One that needs a block when none is free takes the blocks of the last running request
in this order, or steps back itself if it is that one.

Prompts. Running ones get what blocks are left, in order. A waiting one is admitted when its *whole* prompt fits beside
what the running prompts still need and a small reserve for growing streams; otherwise none behind it is admitted
either. So admitted prompts always finish without taking blocks from each other.

Adapters. A waiting request whose adapter is not on the device, or whose adapter would be one too many, is passed over
and blocks nobody, until it has been kept out *by residency* for `drain_after` seconds: from then on the oldest such
request claims a place, and nothing behind it is admitted unless both fit. Running requests of other adapters drain
away and the claim is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.state import RequestState, SchedulerState


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt that may run up to `tokens` tokens now; the planner may cut that, and drop candidates from the end."""

    request: RequestState
    tokens: int


@dataclass(frozen=True, slots=True)
class Admission:
    decodes: tuple[RequestState, ...]  # in order of arrival
    candidates: tuple[Candidate, ...]  # in the order in which they run
    preempt: tuple[str, ...]
    unservable: tuple[str, ...]
    adapters: tuple[str, ...]  # that ought to be on the device: those in use, then those waited for, in service order


class AdmissionPolicy:
    """Decides per iteration; remembers only since when waiting requests have been kept out by residency."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._blocked_since: dict[str, float] = {}

    def decide(self, state: SchedulerState) -> Admission:
        running, prompts = _in_order(state)
        pool = _Pool(state.free_blocks, state.block_size)
        decodes, preempted, unservable = _run_decodes(running, pool)
        alive = [r for r in running if r.request_id not in preempted] if preempted else running
        if preempted:
            prompts = [r for r in prompts if r.request_id not in preempted]
        chunks: list[Candidate] = []
        if not unservable:
            chunks = self._chunks(state, prompts, alive, pool, unservable, closed=bool(preempted))
        if not decodes and not chunks and not unservable and alive:
            chunks = self._break_deadlock(state, prompts, alive, pool, preempted, unservable)
        decodes.sort(key=lambda r: r.arrived)
        adapters = _wanted([*alive, *(c.request for c in chunks), *prompts], state.max_adapters)
        return Admission(tuple(decodes), tuple(chunks), tuple(preempted), tuple(unservable), adapters)

    def _break_deadlock(
        self,
        state: SchedulerState,
        prompts: list[RequestState],
        alive: list[RequestState],
        pool: _Pool,
        preempted: list[str],
        unservable: list[str],
    ) -> list[Candidate]:
        """Only prompts are admitted, they hold all blocks and none can go on: the last ones step back for the first."""
        if not any(r.adapter_ready for r in alive):
            return []  # they wait for adapters, not for blocks
        alone = len(alive) == 1
        while len(alive) > 1:
            victim = alive.pop()
            preempted.append(victim.request_id)
            pool.free += victim.blocks_held - victim.blocks_shared
            prompts = [r for r in prompts if r is not victim]
            chunks = self._chunks(state, prompts, alive, pool, unservable, closed=True)
            if chunks:
                return chunks
        if alone:
            unservable.append(alive[0].request_id)
        return []

    def _chunks(
        self,
        state: SchedulerState,
        prompts: list[RequestState],
        alive: list[RequestState],
        pool: _Pool,
        unservable: list[str],
        closed: bool,
    ) -> list[Candidate]:
        """Chunks for running prompts and, unless `closed`, admissions; at most `max_chunk` tokens together."""
        chunks: list[Candidate] = []
        left = self._config.max_chunk
        places = state.max_running - len(alive)
        resident = {r.adapter for r in alive if r.adapter is not None}
        reserve = ceil(self._config.decode_reserve * len(alive))
        promised = sum(pool.needed(r, r.total_tokens) for r in alive if not _decoding(r))
        spare = pool.free - promised - reserve
        claim: str | None = None
        blocked: dict[str, float] = {}
        for r in prompts:
            want = r.total_tokens - r.computed_tokens
            if r.running:
                tokens = min(want, left, pool.room(r))
                if tokens > 0 and r.adapter_ready:
                    pool.take(r, r.computed_tokens + tokens)
                    chunks.append(Candidate(r, tokens))
                    left -= tokens
                continue
            if closed:
                continue
            if r.adapter is not None:
                held = resident | {r.adapter}
                if claim is not None and (alive or chunks):  # an idle device waits for nobody's load
                    held.add(claim)
                if len(held) > state.max_adapters:
                    since = blocked[r.request_id] = self._blocked_since.get(r.request_id, state.now)
                    if claim is None and state.now - since >= self._config.drain_after:
                        claim = r.adapter
                    continue
                if not r.adapter_ready:
                    # Once kept out by residency it stays a claimant while its adapter loads; else the place that
                    # was drained for it would go to the next request of a resident adapter.
                    if r.request_id in self._blocked_since:
                        since = blocked[r.request_id] = self._blocked_since[r.request_id]
                        if claim is None and state.now - since >= self._config.drain_after:
                            claim = r.adapter
                    continue
            need = pool.needed(r, r.total_tokens)
            if not alive and not chunks and need > pool.free:
                unservable.append(r.request_id)
                continue
            if left <= 0 or places <= 0 or need > (spare if alive or chunks else pool.free):
                closed = True
                continue
            places -= 1
            spare -= need
            tokens = min(want, left)
            pool.take(r, r.computed_tokens + tokens)
            chunks.append(Candidate(r, tokens))
            left -= tokens
            if r.adapter is not None:
                resident.add(r.adapter)
        waiting = {r.request_id for r in prompts} if closed else blocked.keys()
        kept = {k: v for k, v in self._blocked_since.items() if k in waiting and k not in blocked}
        self._blocked_since = kept | blocked
        return chunks


class _Pool:
    """Blocks that are left while a plan is being made."""

    __slots__ = ("free", "size")

    def __init__(self, free: int, size: int) -> None:
        self.free = free
        self.size = size

    def needed(self, request: RequestState, tokens: int) -> int:
        """Blocks that `request` lacks for its first `tokens` tokens."""
        return max(0, -(-tokens // self.size) - request.blocks_held)

    def room(self, request: RequestState) -> int:
        """Tokens that `request` can run with its own blocks and all free ones."""
        return (request.blocks_held + max(0, self.free)) * self.size - request.computed_tokens

    def take(self, request: RequestState, tokens: int) -> None:
        self.free -= self.needed(request, tokens)


def _decoding(request: RequestState) -> bool:
    return request.running and request.output_tokens > 0 and request.total_tokens - request.computed_tokens == 1


def _in_order(state: SchedulerState) -> tuple[list[RequestState], list[RequestState]]:
    """(all running requests, all requests with a prompt to run, waiting ones included), both in service order."""
    first: list[RequestState] = []
    batch: list[RequestState] = []
    overdue = 0
    for r in state.requests:
        if r.slo_class != "batch":
            first.append(r)
        else:
            batch.append(r)
            if r.ttft_deadline <= state.now and not _decoding(r):
                overdue = len(batch)
    if overdue:
        promoted = {r.request_id for r in batch[:overdue]}
        first = [r for r in state.requests if r.slo_class != "batch" or r.request_id in promoted]
    ordered = first + batch[overdue:]
    return [r for r in ordered if r.running], [r for r in ordered if not _decoding(r)]


def _run_decodes(running: list[RequestState], pool: _Pool) -> tuple[list[RequestState], list[str], list[str]]:
    """(decodes that run, requests that give their blocks back, requests that can never go on)."""
    alive = list(running)
    decodes: list[RequestState] = []
    preempted: list[str] = []
    unservable: list[str] = []
    for r in running:
        if not _decoding(r) or not r.adapter_ready:
            continue
        if r.request_id in preempted:
            break  # victims are taken from the end: nothing behind it is left
        need = pool.needed(r, r.total_tokens)
        while need > pool.free and len(alive) > 1 and alive[-1] is not r:
            victim = alive.pop()
            preempted.append(victim.request_id)
            pool.free += victim.blocks_held - victim.blocks_shared
        if need <= pool.free:
            pool.free -= need
            decodes.append(r)
        elif len(alive) > 1:
            alive.pop()
            preempted.append(r.request_id)
            pool.free += r.blocks_held - r.blocks_shared
        elif not preempted:
            unservable.append(r.request_id)
        # else: it waits one iteration; blocks that the victims shared with each other show as free in the next state
    return decodes, preempted, unservable


def _wanted(requests: list[RequestState], most: int) -> tuple[str, ...]:
    wanted: dict[str, None] = {}
    for r in requests:
        if r.adapter is not None:
            if len(wanted) == most and r.adapter not in wanted:
                break
            wanted[r.adapter] = None
    return tuple(wanted)
