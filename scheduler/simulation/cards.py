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
    """Iterations differ from their cost: each by a normal error of the logarithm, a few by much."""

    sigma: float = 0.0
    slow_share: float = 0.0  # of iterations that meet something else on the machine
    slow_factor: tuple[float, float] = (1.2, 1.6)

    def draw(self, rng: random.Random) -> float:
        """A factor on an iteration's seconds."""
        factor = rng.lognormvariate(0.0, self.sigma) if self.sigma else 1.0
        return factor * rng.uniform(*self.slow_factor) if rng.random() < self.slow_share else factor


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
    overhead: float = 0.0  # of an iteration, outside of its parts
    gap: float = 0.0  # between the end of an iteration and the next plan
    optimizer: float = 0.0  # of a job between two of its sweeps, beside the iterations
    optimizer_factor: float = 1.0  # on iterations while that goes on
    noise: Noise = Noise()

    def forward_seconds(self, load: ForwardLoad) -> float:
        """The packed forward; 0 without rows."""
        if not load.rows:
            return 0.0
        seconds = self.forward(load.rows) + self.adapter * load.adapters + self.context * load.decode_context
        seconds += self.attention * (load.prefill_work + load.ride_work)
        if load.logit_rows:
            seconds += self.logits(load.logit_rows)
        return seconds + (self.ride if load.ride_rows else 0.0)

    def slice_seconds(self, rows: int, layers: int, work: int = 0) -> float:
        """`rows` rows through `layers` layers in a pass of their own."""
        return self.slice + (self.ride + self.forward(rows) + self.attention * work) * layers / self.layers

    def head_seconds(self, rows: int, steps: int) -> float:
        return self.head_unit + self.head(rows) * steps / self.head_steps

    def backward_seconds(self, rows: int, work: int = 0) -> float:
        """One layer."""
        return self.backward(rows) + 2.0 * self.attention * work / self.layers

    def quiet(self) -> Card:
        return replace(self, noise=Noise())


def cpu_270m() -> Card:
    """Gemma 3 270M in float32 on two cores of an EPYC server, as it was when the tables of docs/benchmarks.md were
    taken. Decode steps, whole units and training alone agree with the recorded ones to a tenth; the curves between
    (rides of a few rows) have the shape of one core's."""
    return Card(
        name="two cores, 270M, float32",
        layers=18,
        forward=Curve(((1, 0.028), (4, 0.032), (8, 0.035), (16, 0.046), (32, 0.063), (64, 0.093), (128, 0.152),
                       (256, 0.272)), tile=4),
        logits=Curve(((1, 0.021), (4, 0.0215), (8, 0.023), (16, 0.028), (64, 0.075)), tile=4),
        head=Curve(((1, 0.060), (4, 0.070), (16, 0.110), (64, 0.270), (128, 0.480)), tile=4),
        backward=Curve(((1, 0.0030), (8, 0.0042), (32, 0.0071), (128, 0.0172), (256, 0.0322)), tile=4),
        head_steps=32, head_unit=0.0005, ride=0.004, slice=0.0015, attention=2e-8, context=1.5e-6, adapter=0.002,
        overhead=0.0005, gap=0.0015, optimizer=0.15, optimizer_factor=1.45,
        noise=Noise(sigma=0.04, slow_share=0.01, slow_factor=(1.15, 2.0)),
    )  # fmt: skip


def h200_8b() -> Card:
    """An 8B model in bf16 on an H200. Nothing of this was measured with coserve: it is worked out from two measured
    ceilings (790 TFLOP/s of bf16 products, 4.3 TB/s), of which products are taken to reach 60% and 80%, and from the
    assumption that a training token costs 4 FLOP a parameter."""
    read = 16e9 / (0.8 * 4.3e12)  # all weights, once
    token = 2 * 8e9 / (0.6 * 790e12)  # one row through all layers
    layers = 32
    a_layer = read / layers
    turn = int(read / token)  # rows that the reading of the weights hides
    return Card(
        name="H200, 8B, bf16 (assumed)",
        layers=layers,
        forward=Curve(((1, read), (turn, 1.1 * read), (4 * turn, 4.2 * read)), tile=16),
        logits=Curve(((1, 0.0003), (64, 0.0004), (512, 0.0012)), tile=16),
        head=Curve(((1, 0.0009), (64, 0.0011), (512, 0.0034)), tile=16),
        backward=Curve(((1, 1.1 * a_layer), (turn, 1.3 * a_layer), (4 * turn, 4.6 * a_layer)), tile=16),
        head_steps=8, head_unit=2e-5, ride=0.0002, slice=5e-5, attention=3e-13 * 32, context=3e-8, adapter=2e-5,
        overhead=0.0002, gap=0.0003, optimizer=0.02, optimizer_factor=1.0,
        noise=Noise(sigma=0.02, slow_share=0.003, slow_factor=(1.2, 2.0)),
    )  # fmt: skip


def cards() -> dict[str, Card]:
    """By the name that the benchmark's command line uses."""
    return {"cpu-270m": cpu_270m(), "h200-8b": h200_8b()}
