"""What training holds of the memory: what it gives back for requests, how, and when it gets it again.

It may assume that placed sweeps, running requests and their adapters hold blocks of one store, and that admission
counts what it takes or counts on. It never decides which requests run, and never plans more blocks than there are, in
all or for training.

*Give back.* Requests are planned as if all that training may give back were free; what they then use beyond the free
blocks is the shortage. If only waiting prompts are short and a step that ends in time for the first of them would cover
it, nothing is taken. Else sweeps fall back to "recompute", if that is enough; else as few as possible are parked, and
others fall back. Low priority goes first, then the most-served tenant, then the newest. So nobody is preempted while a
sweep could give way. What an adapter waits for is short in the same way, if training holds enough for it and no request
steps back: streams that hold the rest go on. Such an adapter waits for a step's end as long as nobody who waits would
be late for it, and no sweep is placed into its blocks.

*Take.* A sweep is placed when it fits beside what prompts wait for and two blocks more a running request: the
least-served tenant's first, normal priority before low, then the older; whoever has waited for eight times
`memory_claim_after` before all others. None is placed past one that does not fit. A parked one rests for half a second,
the next time for twice as long, and after four times is protected when it comes back.

*Claim.* When no sweep is placed and one has waited for `memory_claim_after`, no prompt is admitted until it fits; then
it is protected: it gives nothing back until it is done, and requests step back for each other. One is protected at a
time, and after it requests have `memory_claim_after` seconds before the next claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from coserve.scheduler.admission import ADAPTER_DUE, BLOCKS, Admission
from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.device_cost import row_seconds
from coserve.scheduler.fairness import FairShare
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.progress import priority_of
from coserve.scheduler.rates import sweep_seconds
from coserve.scheduler.room import Stock
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepState

# Why no prompt is admitted, as the API tells it.
STEP_DUE = "waiting for K/V memory: a training step is due it"
# Why a sweep is not placed, likewise.
REQUESTS_HOLD = "waiting for memory: generation holds it"
STEPS_HOLD = "waiting for memory: other training steps hold all that training may"
TOO_LARGE = "waiting for memory: the step needs more than training may hold"

_AHEAD = 2  # blocks a running request that stay free when a sweep is placed: it would be parked for the next ones
_REST = 0.5  # seconds that a sweep stays parked at least, the first time
_MOST_PARKS = 4  # of one sweep, before it is protected
_OVERDUE = 8  # times `memory_claim_after`: who has waited as long is the next one, whoever is served less


@dataclass(frozen=True, slots=True)
class Moves:
    """What sweeps give back and get before an iteration's forward, and those that may run in it."""

    runnable: tuple[SweepState, ...]
    park: tuple[int, ...] = ()
    lean: tuple[int, ...] = ()
    place: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """How training stands with memory before a plan."""

    stock: Stock  # what requests may count on if training gives way
    ready: tuple[SweepState, ...] = ()  # placed, and may give way
    waiting: tuple[SweepState, ...] = ()  # not placed
    placed_blocks: int = 0
    claimant: SweepState | None = None

    @property
    def givable(self) -> int:
        return sum(s.blocks for s in self.ready)

    @property
    def without_giving(self) -> Stock:
        """What requests may count on if training keeps what it has."""
        return Stock(self.stock.free - self.givable, self.placed_blocks, due=self.stock.due)

    def due(self, admission: Admission) -> int:
        """Blocks that training is to give, if it must, to the adapter that waits."""
        return self.stock.due if self.stock.due <= admission.left and not admission.preempt else 0


def waits(state: SchedulerState) -> dict[int, str]:
    """Sweeps that are not placed, and why."""
    placed = sum(s.blocks for s in state.sweeps if s.placed)

    def reason(sweep: SweepState) -> str:
        if sweep.blocks > state.activation_blocks:
            return TOO_LARGE
        return STEPS_HOLD if placed + sweep.blocks > state.activation_blocks else REQUESTS_HOLD

    return {s.sweep_id: reason(s) for s in state.sweeps if not s.placed}


def runnable(sweeps: tuple[SweepState, ...], park: Sequence[int], place: Sequence[int]) -> tuple[SweepState, ...]:
    """Those that are placed once these have been parked and placed."""
    return tuple([s for s in sweeps if (s.placed or s.sweep_id in place) and s.sweep_id not in park])


def copies(made: Moves | Plan, state: SchedulerState) -> bool:
    """Whether activations go to the host or come back: that takes seconds that no work explains."""
    if not made.place:
        return bool(made.park)
    back = (s for s in state.sweeps if s.sweep_id in made.place)
    return bool(made.park) or any(s.forward_tokens or s.partial_tokens for s in back)


class MemoryPolicy:
    """Decides per plan; remembers who is protected, and how often sweeps were parked. What it remembers is replaced,
    never changed, so that a shallow copy goes its own way."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._claim_after, self._head_rows = config.memory_claim_after, config.head_rows
        self.protected: int | None = None
        self._quiet_since = -inf  # when the last protected sweep was done
        self._parks: Mapping[int, int] = {}  # sweep -> how often it was parked

    def look(self, state: SchedulerState) -> Standing:
        """To be called first, once a plan."""
        ready, waiting, placed, protected = [], [], 0, 0
        for s in state.sweeps:
            if not s.placed:
                waiting.append(s)
            elif s.sweep_id == self.protected:
                protected = s.blocks
            elif s.blocks:
                ready.append(s)
                placed += s.blocks
        if self.protected is not None or self._parks:
            self._forget(state)
        placed += protected
        claimant = self._claimant(state, waiting) if waiting and len(waiting) == len(state.sweeps) else None
        free, due = state.free_blocks + placed - protected, state.adapter_blocks
        if due > free + protected and not any(r.running for r in state.requests):
            due = 0  # nothing that ends would give it as much: it may not keep others back
        stock = Stock(free, protected, due, STEP_DUE if claimant is not None else None)
        return Standing(stock, tuple(ready), tuple(waiting), placed, claimant)

    def lets_end(self, state: SchedulerState, standing: Standing, admission: Admission, model: LatencyModel) -> bool:
        """Whether those of `admission`, made for all of the stock, that lack blocks can wait for the end of a step."""
        due = standing.due(admission)
        shortage = standing.givable - admission.left + due
        if shortage <= 0 or not standing.ready or admission.preempt:
            return False
        if shortage > admission.begun + due:
            return False  # streams or running prompts lack some of them
        # An adapter keeps back whoever waits.
        concerned = state.requests if due else [c.request for c in admission.candidates]
        prompts, row = [r for r in concerned if not r.running], row_seconds(model)
        slack = min(
            (r.ttft_deadline - state.now - (r.total_tokens - r.computed_tokens) * row for r in prompts), default=inf
        )
        return any(
            s.blocks >= shortage and sweep_seconds(model, s, self._head_rows) <= slack for s in state.sweeps if s.placed
        )

    def decide(
        self, state: SchedulerState, standing: Standing, admission: Admission, behind: Iterable[RequestState],
        share: FairShare,
    ) -> Moves:  # fmt: skip
        """`admission`: made for all of the stock; `behind`: prompts that nothing but those before them kept back."""
        if not standing.ready and not standing.waiting:
            return Moves(state.sweeps)
        left, due = admission.left - standing.givable, standing.due(admission)
        park: tuple[int, ...] = ()
        lean: tuple[int, ...] = ()
        place: tuple[int, ...] = ()
        if left < due:
            park, lean = _give_back([*_in_turn(standing.ready, share)][::-1], due - left)
            self._parks = {**self._parks, **{i: self._parks.get(i, 0) + 1 for i in park}}
        elif admission.preempt:
            pass  # what a request gives back is for requests
        elif standing.claimant is not None:
            if standing.claimant.blocks <= left - standing.stock.due:
                self.protected = standing.claimant.sweep_id
                place = (self.protected,)
        elif standing.waiting and admission.closed_by not in (BLOCKS, ADAPTER_DUE):
            left -= standing.stock.due
            place = tuple(self._take(state, standing, left, _wanted(state, admission, behind), share))
        return Moves(runnable(state.sweeps, park, place), park, lean, place)

    def keep(self, state: SchedulerState) -> Moves:
        """Nobody gives or gets anything."""
        return Moves(runnable(state.sweeps, (), ()))

    def _forget(self, state: SchedulerState) -> None:
        """Who is gone; and that one is protected that, for some reason, has lost its place."""
        placed = {s.sweep_id: s.placed for s in state.sweeps}
        if self.protected is not None and not placed.get(self.protected):
            if self.protected not in placed:
                self._quiet_since = state.now
            self.protected = None
        self._parks = {i: n for i, n in self._parks.items() if i in placed}

    def _claimant(self, state: SchedulerState, waiting: Sequence[SweepState]) -> SweepState | None:
        """The one that has waited longest of those for which there will be room once requests leave, if it is time."""
        due = state.now - self._claim_after
        if self._quiet_since > due:
            return None
        late = [s for s in waiting if _since(s, state) <= due]
        if not late:
            return None
        running = [r for r in state.requests if r.running]
        adapters = {r.adapter: r.blocks_adapter for r in running}
        held = sum(r.blocks_held for r in running) + sum(adapters.values())
        most = min(state.activation_blocks, state.free_blocks + held)
        return min((s for s in late if s.blocks <= most), key=lambda s: _since(s, state), default=None)

    def _take(
        self, state: SchedulerState, standing: Standing, left: int, wanted: Callable[[], int], share: FairShare
    ) -> Iterator[int]:
        """Those that get their blocks now, of `left` that nobody counts on."""
        able = [s for s in standing.waiting if s.blocks <= state.activation_blocks and not self._rests(s, state)]
        if not able:
            return
        spare, may = max(0, left - wanted()), state.activation_blocks - standing.placed_blocks
        overdue = state.now - _OVERDUE * self._claim_after
        turn = _in_turn(able, share)
        for s in sorted(turn, key=lambda s: since if (since := _since(s, state)) <= overdue else inf):
            protect = self._parks.get(s.sweep_id, 0) >= _MOST_PARKS
            if s.blocks > min(spare, may) or (protect and self.protected is not None):
                return
            if protect:
                self.protected = s.sweep_id
            spare, may = spare - s.blocks, may - s.blocks
            yield s.sweep_id

    def _rests(self, sweep: SweepState, state: SchedulerState) -> bool:
        parks = self._parks.get(sweep.sweep_id, 0)
        return parks > 0 and state.now - _since(sweep, state) < _REST * 2 ** (parks - 1)


def _give_back(order: Sequence[SweepState], shortage: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(parked, fallen back): as few as give `shortage` blocks together; who is first in `order` goes first."""
    gains = {s.sweep_id: s.blocks - s.lean_blocks for s in order}
    park = _fewest([(s, s.lean_blocks) for s in order], shortage - sum(gains.values()))
    parked = {s.sweep_id for s in park}
    shortage -= sum(s.blocks for s in park)
    lean = _fewest([(s, gains[s.sweep_id]) for s in order if s.sweep_id not in parked], shortage)
    return tuple(s.sweep_id for s in park), tuple(s.sweep_id for s in lean)


def _fewest(order: Sequence[tuple[SweepState, int]], needed: int) -> list[SweepState]:
    """The smallest number that have `needed` together, or all that have any; of those the first ones that will do."""
    left = [(s, size) for s, size in order if size > 0]
    chosen = []
    while needed > 0 and left:
        sums = [0, *accumulate(sorted((size for _, size in left), reverse=True))]
        count = next((n for n, total in enumerate(sums) if total >= needed), len(left))
        goal = min(needed, sums[-1])
        # With the largest of the others it has no more than the `count` largest have, or than these and itself.
        i = next(i for i, (_, size) in enumerate(left) if min(sums[count], size + sums[count - 1]) >= goal)
        sweep, size = left.pop(i)
        chosen.append(sweep)
        needed -= size
    return chosen


def _in_turn(sweeps: Iterable[SweepState], share: FairShare) -> list[SweepState]:
    """Normal priority before low, then the least-served tenant's, then the older."""
    return sorted(share.order_sweeps(tuple(sweeps)), key=lambda s: priority_of(s) == "low")


def _wanted(state: SchedulerState, admission: Admission, behind: Iterable[RequestState]) -> Callable[[], int]:
    """Blocks that a sweep must leave: for running requests, and for the prompts that would be admitted next."""

    def blocks() -> int:
        admitted = {c.request.request_id for c in admission.candidates}
        running = len(state.requests) - admission.waiting
        places = state.max_running - running - sum(not c.request.running for c in admission.candidates)
        following = (r for r in behind if r.request_id not in admitted)
        return _AHEAD * running + sum(
            _blocks(r, state.block_size) for r, _ in zip(following, range(places), strict=False)
        )

    return blocks


def _blocks(request: RequestState, size: int) -> int:
    return max(0, -(-request.total_tokens // size) - request.blocks_held) + request.blocks_adapter


def _since(sweep: SweepState, state: SchedulerState) -> float:
    return state.now if sweep.unplaced_since is None else sweep.unplaced_since
