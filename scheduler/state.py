"""What the scheduler is told before an iteration, and what it answers: plain frozen data.

The engine and a simulator fill `SchedulerState` and carry out `Plan`. Times are seconds of the caller's
monotonic clock. A *sweep* is one packed stream of training sequences going through forward, head and
backward together; its sequences may belong to several jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestState:
    """One admitted generation sequence.

    `total_tokens - computed_tokens` tokens still have to run. A request that has `output_tokens` > 0 and
    exactly one token to run is in decode; otherwise it is in prefill (also after a preemption, which sets
    `computed_tokens` back).
    """

    request_id: str
    tenant: str
    weight: float  # the tenant's share
    slo_class: str  # "interactive" | "batch"
    arrived: float
    total_tokens: int  # prompt + generated so far
    computed_tokens: int  # tokens whose K/V is in the cache, prefix hits included
    output_tokens: int
    blocks_held: int
    adapter: str | None  # version digest
    adapter_ready: bool  # resident in the pool, or None needed
    ttft_deadline: float  # when the first token is due
    # When the next token of a running stream is due; None before the first.
    itl_deadline: float | None = field(compare=False)
    running: bool  # False: still in the waiting queue, holds no blocks
    blocks_shared: int = 0  # of blocks_held, those that other requests hold too: a preemption would not free them
    # Blocks of its adapter that count as free while no running request uses it; of a running one, that would then. 0:
    # it is pinned, it is not there, or it lies elsewhere.
    blocks_adapter: int = 0
    adapter_pages: int = 0  # of its adapter in the pool; 0: none, or not known yet
    adapter_kept_out: bool = False  # its adapter is read, and there will be room for it when others are not in use
    most_output: int = 1 << 30  # output tokens after which it ends at the latest
    deadline: float | None = None  # when it is to be ended, finished or not; None: never

    @property
    def decoding(self) -> bool:
        return self.running and self.total_tokens - self.computed_tokens == 1 and self.output_tokens > 0


@dataclass(frozen=True, slots=True)
class TenantLimit:
    """The most that one tenant's running requests may hold at once; None: whatever there is."""

    blocks: int | None = None  # K/V blocks
    adapter_pages: int | None = None  # of distinct adapters; one adapter may always be there


@dataclass(frozen=True, slots=True)
class SweepJob:
    job_id: str
    tenant: str
    weight: float
    priority: str  # "normal" | "low"
    rows: int = 0  # of the sweep's stream that are this job's; 0: not known, all jobs alike
    adapter_pages: int = 0  # of its adapter in the pool, which all of its rows pass through; 0: not known


@dataclass(frozen=True, slots=True)
class SweepState:
    """Where one training sweep stands. All counts of tokens and rows are of the packed stream.

    Label rows go through the head in *batches*, whose size is fixed when they begin. A batch takes `head_steps` equal
    sub-steps and may stop after any of them; its rows are through the head when the last one is done, and until then
    no other batch of the sweep begins.
    """

    sweep_id: int
    jobs: tuple[SweepJob, ...]
    layers: int
    stream_tokens: int
    window: int  # the largest window, in tokens, of any unit of this sweep
    forward_tokens: int  # rows that have gone through all layers
    partial_tokens: int  # rows of the window that stopped at a layer boundary (0: none)
    partial_layer: int  # the layer that window goes on from
    head_rows_ready: int  # label rows forwarded and not yet through the head
    head_rows_left: int  # label rows not yet through the head, ready or not
    head_steps: int = 2  # sub-steps a batch of label rows takes through the head
    head_partial_rows: int = 0  # rows of the batch that stopped part-way; still counted in ready and left
    head_partial_steps: int = 0  # sub-steps it has done
    backward: bool = True  # False for an evaluation sweep: done after the head
    backward_layer: int = -1  # current layer, layers-1 … 0; -1: all done
    backward_tokens: int = 0  # rows already done in the current layer
    blocks: int = 0  # of the state's blocks: what its activations hold, or will hold once it is placed
    lean_blocks: int = 0  # what they would hold under "recompute"; the same as `blocks` if they hold no more
    placed: bool = True  # False: new, or parked on the host; it cannot run before a plan places it
    unplaced_since: float | None = field(default=None, compare=False)

    @property
    def forward_done(self) -> bool:
        return self.forward_tokens >= self.stream_tokens


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """All there is to plan. Two are equal if the same work stands at the same place, whatever the clock says."""

    now: float = field(compare=False)
    requests: tuple[RequestState, ...]  # running and waiting, in order of arrival
    sweeps: tuple[SweepState, ...]  # in order of creation
    free_blocks: int  # of nobody, of cached prefixes that nobody holds, and of idle adapters that are not pinned
    block_size: int
    max_running: int
    max_adapters: int  # how many distinct adapters the pool can hold at once (a lower bound)
    limits: Mapping[str, TenantLimit] = field(default_factory=dict)  # of tenants that have any
    activation_blocks: int = 1 << 60  # the most blocks that placed sweeps may hold together
    # Blocks that an adapter waits for which a request or a job needs next. What becomes free goes to it before anything
    # new begins, and once so many are free it is loaded, before the next state. 0: none waits, or none that would fit
    # if no request ran and no sweep were placed.
    adapter_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    request_id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Ride:
    """The next `tokens` rows of a sweep go through all layers, inside the packed forward."""

    sweep_id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ForwardUnit:
    """The next window (or the unfinished one) goes through `layers` more layers, in a pass of its own."""

    sweep_id: int
    tokens: int
    layers: int


@dataclass(frozen=True, slots=True)
class HeadUnit:
    """The next batch of label rows, or the unfinished one, goes `steps` sub-steps further.

    `rows` is the batch's size: of the unfinished one, if there is one.
    """

    sweep_id: int
    rows: int
    steps: int


@dataclass(frozen=True, slots=True)
class BackwardUnit:
    """The last `tokens` rows not yet done in the sweep's current layer; never crosses a layer."""

    sweep_id: int
    tokens: int


Unit = ForwardUnit | HeadUnit | BackwardUnit


@dataclass(frozen=True, slots=True)
class Plan:
    """One iteration: the packed forward (decodes, prefills, rides), then the units, in this order."""

    decodes: tuple[str, ...] = ()
    prefills: tuple[Prefill, ...] = ()
    rides: tuple[Ride, ...] = ()
    units: tuple[Unit, ...] = ()
    # Seconds into the iteration after which a unit is left for a later one, because the iteration has become longer
    # than foreseen; of the first units, the others never are. For runners that know the time between units.
    unit_starts: tuple[float, ...] = ()
    preempt: tuple[str, ...] = ()  # requests that give all their blocks back before the forward
    park: tuple[int, ...] = ()  # sweeps whose activations go to the host and give all their blocks back
    lean: tuple[int, ...] = ()  # sweeps that keep no more than "recompute" does from here on, and give back the rest
    place: tuple[int, ...] = ()  # sweeps that get their blocks, after all that are given back and before the forward
    expired: tuple[str, ...] = ()  # requests past their deadline: to be ended
    unservable: tuple[str, ...] = ()  # need more blocks than there are in all: to be ended with an error
    adapters: tuple[str, ...] = ()  # at most max_adapters, most urgent first: load these, evict only others
    predicted_seconds: float = 0.0  # mean of the latency model
    upper_seconds: float = 0.0  # the upper estimate that was held against the budget
    budget_seconds: float = 0.0  # what the inter-token promise allowed this iteration

    @property
    def empty(self) -> bool:
        return not (self.decodes or self.prefills or self.rides or self.units)
