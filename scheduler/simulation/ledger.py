"""What is simulated and what came of it: the set-up of an engine and the record of a run. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve.scheduler.simulation.cards import Card
from coserve.scheduler.simulation.streams import Stream
from coserve.scheduler.simulation.workloads import TrainingJob


@dataclass(frozen=True, slots=True)
class Setup:
    """The engine that is simulated. Times in seconds."""

    card: Card
    itl: float  # promised between two tokens
    ttft: float = 2.0  # promised to the first one; workloads carry it, reports hold it against them
    window: int = 256  # rows of a training unit, at most
    blocks: int = 4096  # of K/V, and of activations
    block_size: int = 16
    max_running: int = 64
    max_adapters: int = 32
    adapter_pages: tuple[int, ...] = (1,)  # of adapters, by turns
    adapter_load: float = 0.05  # of one adapter; one at a time, beside the iterations
    sweep_rows: int = 8192  # of one sweep, at most
    activation: float = 0.0  # blocks of activations that a block of training rows takes; 0: they lie elsewhere
    lean: float = 1.0  # of those, what is left under "recompute"
    activation_blocks: int = 1 << 60  # the most that all activations take


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration; times in seconds."""

    began: float
    seconds: float
    predicted: float  # 0 where the policy did not say
    upper: float
    budget: float
    decodes: int
    prefill: int  # rows
    rides: int  # rows
    units: int
    training: float  # of its seconds, by the card's own costs; a ride counts what it adds
    train_forward: float = 0.0  # rows, a unit of some layers counting its share of the depth
    head: float = 0.0  # label rows, likewise by sub-steps
    train_backward: float = 0.0  # rows, likewise by layers

    def record(self) -> dict[str, object]:
        """As the engine's own ledger has it, for `fit`."""
        tokens = {
            "decode": self.decodes, "prefill": self.prefill, "train_forward": self.train_forward, "head": self.head,
            "train_backward": self.train_backward,
        }  # fmt: skip
        return {"tokens": tokens, "measured_s": self.seconds, "predicted_s": self.predicted}


@dataclass
class Ledger:
    """Everything that happened."""

    seconds: float
    setup: Setup
    streams: list[Stream] = field(default_factory=list)  # all that arrived, whatever became of them
    jobs: list[TrainingJob] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds) between two tokens of a stream
    iterations: list[Iteration] = field(default_factory=list)
    service: dict[str, list[float]] = field(default_factory=dict)  # tenant -> [serving, training] device seconds
    restarts: int = 0

    def charge(self, kind: int, shares: dict[str, float], seconds: float) -> None:
        """Spread device seconds of serving (0) or training (1) over tenants by their shares."""
        whole = sum(shares.values())
        for tenant, share in shares.items():
            self.service.setdefault(tenant, [0.0, 0.0])[kind] += seconds * share / whole
