"""A generation request and a training sweep as the simulated device sees them: how far each has come.

A sweep refuses units that its order forbids, by rules of its own: it shares no code with the planner's progress.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, SweepJob, SweepState, Unit

Progress = tuple[int, ...]  # of a sweep: all that its next unit depends on


class BrokenPlan(RuntimeError):
    """A plan asks for something that its state does not allow."""


def require(condition: bool, message: str) -> None:
    """Raises BrokenPlan."""
    if not condition:
        raise BrokenPlan(message)


def products(rows: int, window: int | None = None) -> int:
    """Query-key products of the first `rows` causal rows of a sequence, each with at most the last `window`."""
    seen = rows if window is None else min(rows, window)
    return seen * (seen + 1) // 2 + (rows - seen) * seen


@dataclass
class Stream:
    """One generation request."""

    name: str
    arrived: float
    prompt: int
    outputs: int
    slo_class: str = "interactive"
    adapter: str | None = None
    ttft: float = 1.0  # seconds from arrival to the first token, as promised
    itl: float | None = None  # seconds between two tokens, as promised; None: the engine's promise
    tenant: str = "t"
    weight: float = 1.0
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    running: bool = False
    last_token: float | None = None
    admitted_at: float | None = None
    first_at: float | None = None
    finished_at: float | None = None
    preemptions: int = 0
    lost: int = 0  # tokens whose K/V preemptions took
    cut: bool = False  # ended by a restart of the engine
    most: int = 1 << 30  # output tokens that its client allows
    deadline: float | None = None  # when it is to be ended

    @property
    def total(self) -> int:
        return self.prompt + self.generated

    @property
    def finished(self) -> bool:
        return self.generated >= self.outputs

    @property
    def decoding(self) -> bool:
        return self.running and self.generated > 0 and self.total - self.computed == 1


@dataclass
class Sweep:
    """A packed stream of training rows on its way through forward, head and backward.

    The last `labels` rows of every `sequence` rows bear a label (0: of the whole stream); a batch of label rows takes
    `head_steps` sub-steps.
    """

    number: int
    rows: int
    labels: int
    layers: int = 4
    window: int = 64
    backward: bool = True
    priority: str = "normal"
    forwarded: int = 0
    partial: int = 0
    partial_layer: int = 0
    head_steps: int = 2
    headed: int = 0
    batch: int = 0
    batch_steps: int = 0
    layer: int = field(default=-2)
    layer_rows: int = 0
    sequence: int = 0
    jobs: tuple[SweepJob, ...] = ()
    blocks: int = 0  # that its activations hold while it is placed
    lean_blocks: int = 0  # after it has fallen back to "recompute"
    placed: bool = True
    unplaced_since: float | None = None
    parked: Progress | None = None  # what was copied to the host
    parks: int = 0
    placed_at: float | None = None
    forward_cuts: list[int] = field(default_factory=list)
    head_cuts: list[int] = field(default_factory=list)
    head_stops: int = 0
    backward_cuts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layer = self.layers - 1 if self.backward else -1
        if not self.jobs:
            self.jobs = (SweepJob(f"job-{self.number}", "t", 1.0, self.priority),)

    @property
    def row_pages(self) -> float:
        """Adapter pages that a row passes through; jobs have as many rows each."""
        return sum(job.adapter_pages for job in self.jobs) / len(self.jobs)

    @property
    def all_labels(self) -> int:
        return self._labels_before(self.rows)

    @property
    def ready(self) -> int:
        """Label rows that are forwarded and not through the head."""
        return self._labels_before(self.forwarded) - self.headed

    @property
    def finished(self) -> bool:
        return self.forwarded == self.rows and self.headed == self.all_labels and self.layer < 0

    def _labels_before(self, row: int) -> int:
        length = self.sequence or self.rows
        whole, rest = divmod(row, length)
        last = min(length, self.rows - whole * length)  # rows of the sequence that `row` lies in
        return whole * min(self.labels, length) + max(0, rest - max(0, last - self.labels))

    def work(self, end: int, rows: int, window: int | None = None) -> int:
        """Query-key products of the `rows` causal rows before row `end`, each within its own sequence and `window`."""
        length = self.sequence or self.rows
        total, row = 0, end - rows
        while row < end:
            before = row % length
            count = min(length - before, end - row)
            total += products(before + count, window) - products(before, window)
            row += count
        return total

    def state(self) -> SweepState:
        return SweepState(
            sweep_id=self.number,
            jobs=self.jobs,
            layers=self.layers,
            stream_tokens=self.rows,
            window=self.window,
            forward_tokens=self.forwarded,
            partial_tokens=self.partial,
            partial_layer=self.partial_layer,
            head_rows_ready=self.ready,
            head_rows_left=self.all_labels - self.headed,
            head_steps=self.head_steps,
            head_partial_rows=self.batch,
            head_partial_steps=self.batch_steps,
            backward=self.backward,
            backward_layer=self.layer,
            backward_tokens=self.layer_rows,
            blocks=self.blocks,
            lean_blocks=self.lean_blocks,
            placed=self.placed,
            unplaced_since=self.unplaced_since,
        )

    @property
    def progress(self) -> Progress:
        return (
            self.forwarded, self.partial, self.partial_layer, self.headed, self.batch, self.batch_steps, self.layer,
            self.layer_rows,
        )  # fmt: skip

    def park(self, now: float) -> None:
        require(self.placed, "a sweep is parked that is not placed")
        self.parked, self.placed, self.unplaced_since = self.progress, False, now
        self.parks += 1

    def fall_back(self) -> None:
        require(self.placed and self.lean_blocks < self.blocks, "a sweep falls back that has nothing to give")
        self.blocks = self.lean_blocks

    def place(self, now: float) -> None:
        require(not self.placed, "a sweep is placed twice")
        require(self.parked in (None, self.progress), "a parked sweep went on")
        self.parked, self.placed, self.unplaced_since, self.placed_at = None, True, None, now

    def ride(self, tokens: int) -> None:
        require(self.placed, "a sweep runs that is not placed")
        require(self.partial == 0, "a ride would overtake an unfinished window")
        require(0 < tokens <= min(self.window, self.rows - self.forwarded), "a ride of rows that are not there")
        self.forwarded += tokens
        self.forward_cuts.append(tokens)

    def run(self, unit: Unit) -> None:
        require(self.placed, "a sweep runs that is not placed")
        if isinstance(unit, ForwardUnit):
            self._forward(unit)
        elif isinstance(unit, HeadUnit):
            self._head(unit)
        else:
            self._backward(unit)

    def _forward(self, unit: ForwardUnit) -> None:
        if self.partial:
            require(unit.tokens == self.partial, "an unfinished window changed its size")
        require(0 < unit.tokens <= min(self.window, self.rows - self.forwarded), "a window of rows that are not there")
        self.partial = unit.tokens
        self.partial_layer += unit.layers
        require(unit.layers > 0, "a forward unit of no layer")
        require(self.partial_layer <= self.layers, "a forward unit ran over the last layer")
        if self.partial_layer == self.layers:
            self.forwarded += unit.tokens
            self.forward_cuts.append(unit.tokens)
            self.partial = self.partial_layer = 0

    def _head(self, unit: HeadUnit) -> None:
        if self.batch:
            require(unit.rows == self.batch, "an unfinished batch of label rows changed its size")
        require(0 < unit.rows <= self.ready, "label rows that are not there")
        require(0 < unit.steps <= self.head_steps - self.batch_steps, "a head unit ran over its batch's end")
        self.batch = unit.rows
        self.batch_steps += unit.steps
        if self.batch_steps == self.head_steps:
            self.headed += unit.rows
            self.head_cuts.append(unit.rows)
            self.batch = self.batch_steps = 0
        else:
            self.head_stops += 1

    def _backward(self, unit: BackwardUnit) -> None:
        require(self.forwarded == self.rows and self.headed == self.all_labels, "backward before forward and head")
        require(self.layer >= 0, "a backward unit after the last layer")
        require(0 < unit.tokens <= self.window, "a backward unit larger than a window")
        require(self.layer_rows + unit.tokens <= self.rows, "a backward unit crossed a layer")
        self.layer_rows += unit.tokens
        self.backward_cuts.append((self.layer, unit.tokens))
        if self.layer_rows == self.rows:
            self.layer, self.layer_rows = self.layer - 1, 0
