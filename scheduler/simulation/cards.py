"""What work costs on a device: the ground truth that the scheduler's latency model has to find out.

It may assume nothing about how costs are predicted: curves here bend at other rows than the model's buckets, products
come in tiles, and noise multiplies whole parts. It never looks at a plan; the device counts the work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from coserve.scheduler.features import ForwardLoad


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by rows: straight lines between points, the last one goes on. Rows count as the next full tile."""

    points: tuple[tuple[int, float], ...]  # (rows, seconds), at least two, rows rising
    tile: int = 1

    def __post_init__(self) -> None:
        rows = [r for r, _ in self.points]
        if len(rows) < 2 or rows != sorted(set(rows)) or self.tile < 1:
            raise ValueError(f"a curve needs two points or more with rising rows and a tile of at least 1: {self}")

    def __call__(self, rows: int) -> float:
        rows = -(-rows // self.tile) * self.tile
        (low, below), (high, above) = self.points[0], self.points[1]
        for following in self.points[2:]:
            if rows <= high:
                break
            (low, below), (high, above) = (high, above), following
        return max(0.0, below + (above - below) * (rows - low) / (high - low))


@dataclass(frozen=True, slots=True)
class Noise:
    """Iterations differ from their cost: each by a normal error of the logarithm, a few by a factor, and a few by
    seconds that do not depend on what they do (another process wanted the core)."""

    sigma: float = 0.0
    slow_share: float = 0.0
    slow_factor: tuple[float, float] = (1.2, 1.6)
    stall_share: float = 0.0
    stall_seconds: tuple[float, float] = (0.0, 0.0)

    def draw(self, rng: random.Random, seconds: float) -> float:
        """What an iteration of `seconds` takes."""
        if self.sigma:
            seconds *= rng.lognormvariate(0.0, self.sigma)
        if rng.random() < self.slow_share:
            seconds *= rng.uniform(*self.slow_factor)
        if self.stall_share and rng.random() < self.stall_share:
            seconds += rng.uniform(*self.stall_seconds)
        return seconds


@dataclass(frozen=True, slots=True)
class Card:
    """One device with one model on it. All figures are seconds."""

    name: str
    layers: int  # of the model
    forward: Curve  # the packed pass through all layers, by rows
    logits: Curve  # the head and sampling of generation rows
    head: Curve  # a batch of label rows through all its sub-steps
    backward: Curve  # one layer's backward unit, by rows
    head_steps: int = 32  # sub-steps of such a batch
    head_unit: float = 0.0  # of every head unit, whatever it does
    ride: float = 0.0  # of a sweep's rows in the packed pass, beside their share of its rows
    slice: float = 0.0  # of every forward unit, beside its layers
    attention: float = 0.0  # of a query-key product, all layers
    context: float = 0.0  # of a cached token that a decode row reads
    adapter: float = 0.0  # of a distinct adapter in the pass
    adapter_page: float = 0.0  # of a page of it
    adapter_row: float = 0.0  # of a row times the pages of its adapter; in one layer's backward its share of the layers
    windows: tuple[int | None, ...] = ()  # tokens that each layer attends to at most; empty: all to all before them
    replay: Curve | None = None  # a captured pass of decode rows and their logits, by the graph's rows
    graph_rows: tuple[int, ...] = ()  # that graphs have
    overhead: float = 0.0  # of an iteration, outside of its parts
    gap: float = 0.0  # between the end of an iteration and the next plan
    copy: float = 0.0  # of a block of activations to the host, or back
    optimizer: float = 0.0  # of a job between two of its sweeps, beside the iterations
    optimizer_factor: float = 1.0  # on iterations while that goes on
    noise: Noise = Noise()

    def forward_seconds(self, load: ForwardLoad) -> float:
        """The packed forward; 0 without rows."""
        if not load.rows:
            return 0.0
        seconds = self.adapter * load.adapters + self.context * load.decode_context
        seconds += self.adapter_page * load.adapter_sizes + self.adapter_row * load.adapter_rows
        if load.graph_rows and self.replay is not None:
            return seconds + self.replay(load.graph_rows)
        seconds += self.forward(load.rows) + self.attention * (load.prefill_work + load.ride_work)
        if load.logit_rows:
            seconds += self.logits(load.logit_rows)
        return seconds + (self.ride if load.ride_rows else 0.0)

    def replayed(self, rows: int) -> int:
        """Rows of the graph for so many decode rows; 0: there is none."""
        return min((n for n in self.graph_rows if n >= rows), default=0) if rows else 0

    def slice_seconds(self, rows: int, layers: int, work: float = 0, pages: float = 0.0) -> float:
        """`rows` rows through `layers` layers in a pass of their own; `work`: products of a layer on average."""
        passed = self.attention * work + self.adapter_row * rows * pages
        return self.slice + (self.ride + self.forward(rows) + passed) * layers / self.layers

    def head_seconds(self, rows: int, steps: int) -> float:
        return self.head_unit + self.head(rows) * steps / self.head_steps

    def backward_seconds(self, rows: int, work: int = 0, pages: float = 0.0) -> float:
        """One layer; `work`: its products."""
        return self.backward(rows) + 2.0 * (self.attention * work + self.adapter_row * rows * pages) / self.layers

    def quiet(self) -> Card:
        return replace(self, noise=Noise())


def cpu_270m() -> Card:
    """Gemma 3 270M in float32 on two cores of an EPYC server, as it was when the tables of docs/benchmarks.md were
    taken. Decode steps, whole units and training alone agree with the recorded ones to a tenth; the curves between
    (rides of a few rows) have the shape of one core's. Of the recorded iterations beside a job, 3 in 100 took 15 to 45
    ms longer than others like them, however long they were."""
    return Card(
        name="two cores, 270M, float32",
        layers=18,
        forward=Curve(((1, 0.0195), (4, 0.0220), (8, 0.0250), (16, 0.0330), (32, 0.0410), (64, 0.0590), (128, 0.108),
                       (256, 0.210)), tile=4),
        logits=Curve(((1, 0.0145), (4, 0.0150), (8, 0.0165), (16, 0.0200), (64, 0.0530)), tile=4),
        head=Curve(((1, 0.036), (4, 0.042), (16, 0.066), (64, 0.162), (128, 0.288)), tile=4),
        backward=Curve(((1, 0.0021), (8, 0.0029), (32, 0.0049), (128, 0.0119), (256, 0.0222)), tile=4),
        head_steps=32, head_unit=0.0005, ride=0.003, slice=0.0010, attention=2e-8, context=1.5e-6, adapter=0.002,
        windows=(512, 512, 512, 512, 512, None) * 3, overhead=0.0005, gap=0.0012, copy=1.2e-4, optimizer=0.12,
        optimizer_factor=1.5,
        noise=Noise(sigma=0.04, slow_share=0.002, slow_factor=(1.5, 2.0), stall_share=0.03,
                    stall_seconds=(0.015, 0.045)),
    )  # fmt: skip


def h200_8b() -> Card:
    """An 8B model in bf16 on an H200. Nothing of this was measured with coserve: it is worked out from two measured
    ceilings (790 TFLOP/s of bf16 products, 4.3 TB/s), of which products are taken to reach 60% and 80%, and from the
    assumptions that a training token costs 4 FLOP a parameter, that the host needs 9 ms to launch a pass's kernels one
    by one, that a captured pass needs no more than the device does, and that copies to the host and back go at
    50 GB/s."""
    read = 16e9 / (0.8 * 4.3e12)  # all weights, once
    token = 2 * 8e9 / (0.6 * 790e12)  # one row through all layers
    layers = 32
    a_layer = read / layers
    turn = int(read / token)  # rows that the reading of the weights hides
    launches = 0.009
    hidden = turn + int((launches - 1.1 * read) / (3.1 * read) * 3 * turn)  # rows that the launches hide
    return Card(
        name="H200, 8B, bf16 (assumed)",
        layers=layers,
        forward=Curve(((1, launches), (hidden, 1.02 * launches), (4 * turn, 4.2 * read)), tile=16),
        replay=Curve(((1, read + 0.0003), (turn, 1.1 * read + 0.0005), (4 * turn, 4.2 * read + 0.0012)), tile=16),
        graph_rows=(1, 2, 4, *range(8, 65, 8), *range(80, 257, 16)),
        logits=Curve(((1, 0.0003), (64, 0.0004), (512, 0.0012)), tile=16),
        head=Curve(((1, 0.0009), (64, 0.0011), (512, 0.0034)), tile=16),
        backward=Curve(((1, 1.1 * a_layer), (turn, 1.3 * a_layer), (4 * turn, 4.6 * a_layer)), tile=16),
        head_steps=8, head_unit=2e-5, ride=0.0002, slice=5e-5, attention=3e-13 * 32, context=3e-8, adapter=2e-5,
        adapter_page=1e-5, adapter_row=3e-8, overhead=0.0002, gap=0.0003, copy=4.2e-5, optimizer=0.02,
        optimizer_factor=1.0,
        noise=Noise(sigma=0.02, slow_share=0.003, slow_factor=(1.2, 2.0)),
    )  # fmt: skip


def cards() -> dict[str, Card]:
    """By the name that the benchmark's command line uses."""
    return {"cpu-270m": cpu_270m(), "h200-8b": h200_8b()}
