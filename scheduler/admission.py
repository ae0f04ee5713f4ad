"""Which generation requests may run now: decodes, preemptions, and the queue of prompts that may be chunked.

It may assume that requests come in order of arrival and that blocks nobody holds count as free. It never looks at
predicted time (the planner cuts the prompts' chunks) and never plans more blocks than there are, in all or of a
tenant's share.

Order. Interactive requests come before batch ones; a batch request whose first token is overdue counts as interactive,
and so do all batch requests of its tenant before it. Within a class the tenant goes first that has had least of the
device (`fairness`), of those that are level the one whose first token is due next; a tenant's own requests go by
deadline, then by arrival. With one tenant and one promise that is first come, first served.

Decodes. All running decodes run. One that needs a block when none is free takes the blocks of the last running request
in this order (the most-served tenant's newest), or steps back itself if it is that one. One that needs a block when
its tenant's share is used up takes those of the last one of its own tenant.

Prompts. Running ones get what blocks are left, in order. A waiting one is admitted when its *whole* prompt fits beside
what the running prompts still need and what all streams are expected to grow by (`spare`); otherwise none behind it is
admitted either. So admitted prompts finish without taking blocks from each other. One that does not fit its tenant's
share keeps back its own tenant only. Adapters may lie in the same blocks: then a prompt needs those of an idle one that
it wakes as well, and leaves those that another one waits for, which running requests may use all the same.

Adapters. A waiting request whose adapter is not on the device, or whose adapter would be one too many, is passed over
and blocks nobody, until it has been kept out *by residency* for `drain_after` seconds: from then on the first such
request claims a place, and nothing behind it is admitted unless both fit. Running requests of other adapters drain
away and the claim is served. An adapter that is larger than others may have a place and no room: then nothing behind it
with another adapter is admitted until it is there. One that its tenant's share of the pages keeps out holds back its
tenant after that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from operator import attrgetter

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.crowd import Crowd
from coserve.scheduler.decodes import run_decodes
from coserve.scheduler.fairness import FairShare
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.outputs import Outputs
from coserve.scheduler.room import Room, Stock, wanted_adapters
from coserve.scheduler.spare import Spare
from coserve.scheduler.state import RequestState, SchedulerState

# Why a request waits, as the API tells it.
PLACES = "waiting for a place: as many requests run as may"
BLOCKS = "waiting for K/V memory"
SHARE = "waiting for your own requests: they hold all of your share of the K/V memory"
CROWD = "waiting for your own requests: more at once would delay other tenants"
LOADING = "waiting for its adapter to be loaded"
ADAPTER_DUE = "waiting for K/V memory: an adapter is due it"
RESIDENCY = "waiting for room for its adapter: those in use fill the adapter memory"
ROOM = "waiting for memory for its adapter: what becomes free goes to it"
PAGES = "waiting for your own adapters: they hold all of your share of the adapter memory"
TURN = "waiting for the prompts before it"


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
    waiting: int  # requests that did not run before
    closed_by: str  # why the queue went no further
    begun: int  # blocks for prompts that begin now, whole, with the reserve
    left: int  # of the stock, beside decodes, whole prompts and the reserve; negative: running prompts still lack some


class AdmissionPolicy:
    """Decides per iteration; remembers since when waiting requests have been kept out by residency, and why requests
    were kept back the last time."""

    def __init__(self, config: SchedulerConfig, outputs: Outputs) -> None:
        self._config, self._outputs = config, outputs
        self._blocked_since: dict[str, float] = {}
        self.closed_by = TURN  # why the queue went no further
        self.kept_back: dict[str, str] = {}  # request, or tenant, that was passed over -> why

    def decide(
        self, state: SchedulerState, share: FairShare, lineup: Lineup, crowd: Crowd, stock: Stock, release: bool = False
    ) -> Admission:
        """`release`: more blocks will be free in the next state. Until then nobody is admitted, loses his or is refused
        for lack of them."""
        running = lineup.running
        room = Room(state, running, stock)
        decodes, prompts, preempted, unservable = run_decodes(running, room, release)
        alive, in_use = running, room.adapters
        if preempted:
            alive, prompts = ([r for r in some if r.request_id not in preempted] for some in (running, prompts))
        queue = _Queue(self._config, state, share, lineup, room, crowd, self._outputs, self._blocked_since)
        if not unservable:
            queue.fill(alive, prompts, TURN if release or preempted else stock.closed)
        if not (decodes or queue.chunks or queue.unservable or unservable or release) and alive:
            self._break_deadlock(queue, alive, preempted, unservable)
        self._blocked_since, self.closed_by, self.kept_back = queue.blocked_since, queue.closed_by, queue.kept_back
        unservable += queue.unservable
        decodes.sort(key=attrgetter("arrived"))
        ahead = [*(c.request for c in queue.chunks), *queue.looked_at]
        others: Iterable[RequestState] = state.requests
        if preempted:
            in_use, ahead = (), [*alive, *ahead]
            others = [r for r in state.requests if r.request_id not in preempted]
        adapters = wanted_adapters(in_use, ahead, others, state.max_adapters)
        return Admission(
            tuple(decodes), tuple(queue.chunks), tuple(preempted), tuple(unservable), adapters,
            len(state.requests) - len(running), queue.closed_by, queue.begun, queue.left,
        )  # fmt: skip

    def reason(self, request: RequestState) -> str:
        """Why a waiting request was not admitted the last time."""
        return self._kept_back(request) or self.closed_by

    def behind(self, state: SchedulerState) -> Iterator[RequestState]:
        """Prompts that nothing but those before them kept back the last time."""
        if self.closed_by != TURN:
            return iter(())
        return (r for r in state.requests if not r.running and not self._kept_back(r))

    def _kept_back(self, r: RequestState) -> str | None:
        return self.kept_back.get(r.request_id) or self.kept_back.get(r.tenant)

    def _break_deadlock(
        self, queue: _Queue, alive: list[RequestState], preempted: list[str], unservable: list[str]
    ) -> None:
        """Only prompts are admitted, they hold all blocks and none can go on: the last ones step back for the first."""
        if not any(r.adapter_ready for r in alive):
            return  # they wait for adapters, not for blocks
        alone = len(alive) == 1 and not queue.room.kept  # else it waits for the end of a training step
        while len(alive) > 1:
            victim = alive.pop()
            preempted.append(victim.request_id)
            queue.room.give_back(victim)
            queue.go_on(r for r in alive if not r.decoding)
            if queue.chunks:
                return
        if alone:
            unservable.append(alive[0].request_id)


class _Queue:
    """Chunks for running prompts and admissions of waiting ones, at most `max_chunk` tokens together."""

    def __init__(self, config: SchedulerConfig, state: SchedulerState, share: FairShare, lineup: Lineup, room: Room,
                 crowd: Crowd, outputs: Outputs, blocked_since: dict[str, float]) -> None:  # fmt: skip
        self._config, self._state = config, state
        self._share, self._lineup, self._crowd, self._outputs = share, lineup, crowd, outputs
        self._left = config.max_chunk
        self._was_blocked = blocked_since
        self._claim: str | None = None  # an adapter that has waited for a place for too long
        self._claims_room = False  # it has a place, and those in use leave too little room for it
        self.room = room
        self.chunks: list[Candidate] = []
        self.unservable: list[str] = []
        self.looked_at: list[RequestState] = []  # waiting requests that came up, in order
        self.blocked_since, self.closed_by = blocked_since, TURN
        self.kept_back: dict[str, str] = {}
        self.begun, self.left = 0, room.free  # as in `Admission`

    def fill(self, alive: list[RequestState], prompts: list[RequestState], closed: str | None) -> None:
        """`prompts`: those of `alive` that are; `closed`: why nobody is admitted."""
        self.left = self.room.free - sum(self.room.needed(r, r.total_tokens) for r in prompts)
        if closed:
            self.closed_by = closed
            self.go_on(prompts)
            return
        places = self._state.max_running - len(alive)
        spare = Spare(self._config, self._outputs, self.room, alive, prompts)
        self._crowd.begin(alive)
        began = set()
        blocked: dict[str, float] = {}
        for r in self._lineup:
            if r.running:
                self._chunk(r)
                began.add(r.request_id)
                continue
            self.looked_at.append(r)
            idle = not alive and not self.chunks
            need = self.room.needed(r, r.total_tokens)
            if not self._may_use_adapter(r, idle, blocked):
                continue
            whole = need + self.room.wakes(r)
            if need > self.room.share(r.tenant) or (idle and whole > self.room.free + self.room.kept):
                self.unservable.append(r.request_id)
                continue
            own = need + self._own_reserve(r, alive) <= self.room.left_of_share(r.tenant)
            if not own or not self._crowd.has_room(r.tenant, self._share.is_least(r.tenant)):
                self.kept_back[r.tenant] = CROWD if own else SHARE
                self._lineup.shut(r.tenant)
                continue
            if self._left <= 0 or places <= 0:
                self.closed_by = PLACES if places <= 0 else TURN
                break
            if not spare.admit(r, whole, idle):
                self.closed_by = ADAPTER_DUE if spare.is_due(r, whole, idle) else BLOCKS
                break
            places -= 1
            self.begun += whole + (0 if self.begun else spare.reserve)
            self._crowd.admit(r.tenant)
            self.room.claim(r, need)
            self._chunk(r)
            self.room.use(r)
        self.left -= self.begun
        self.go_on(r for r in prompts if r.request_id not in began)
        self._remember(blocked)

    def go_on(self, prompts: Iterable[RequestState]) -> None:
        """Chunks for running prompts only."""
        for r in prompts:
            self._chunk(r)

    def _chunk(self, r: RequestState) -> None:
        tokens = min(r.total_tokens - r.computed_tokens, self._left, self.room.tokens(r))
        if tokens > 0 and r.adapter_ready:
            self.room.take(r, r.computed_tokens + tokens)
            self.chunks.append(Candidate(r, tokens))
            self._left -= tokens

    def _own_reserve(self, request: RequestState, alive: list[RequestState]) -> int:
        """Of a tenant's share, what its growing streams are left; nothing where it has no share of its own."""
        if request.tenant not in self._state.limits:
            return 0
        return ceil(self._config.decode_reserve * sum(r.tenant == request.tenant for r in alive))

    def _may_use_adapter(self, r: RequestState, idle: bool, blocked: dict[str, float]) -> bool:
        if r.adapter is None:
            return True
        has_pages = self.room.has_pages(r)
        if self._claims_room and r.adapter != self._claim:
            has_place = False
        else:  # an idle device waits for nobody's load
            has_place = self.room.has_place(r.adapter, None if idle else self._claim)
        # Once kept out by residency a request stays a claimant while its adapter loads; else the place that was drained
        # for it would go to the next request of a resident adapter.
        loads_again = not r.adapter_ready and r.request_id in self._was_blocked
        if not (has_pages and has_place) or r.adapter_kept_out or loads_again:
            since = blocked[r.request_id] = self._was_blocked.get(r.request_id, self._state.now)
            if self._state.now - since >= self._config.drain_after:
                if not has_pages:
                    self._lineup.shut(r.tenant)
                elif self._claim is None:
                    self._claim, self._claims_room = r.adapter, r.adapter_kept_out
        if has_pages and has_place and r.adapter_ready:
            return True
        full = ROOM if r.adapter_kept_out and self.room.due else RESIDENCY
        waits = full if r.adapter_kept_out or not has_place else LOADING
        self.kept_back[r.request_id] = waits if has_pages else PAGES
        return False

    def _remember(self, blocked: dict[str, float]) -> None:
        """Since when who is blocked: who came up and was not is forgotten; so is who is gone, once those are many."""
        if self._was_blocked:
            came_up = {r.request_id for r in self.looked_at}
            blocked |= {k: v for k, v in self._was_blocked.items() if k not in came_up}
        if len(blocked) > len(self._state.requests) - len(self._lineup.running):
            waiting = {r.request_id for r in self._state.requests if not r.running}
            blocked = {k: v for k, v in blocked.items() if k in waiting}
        self.blocked_since = blocked
