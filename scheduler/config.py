"""What an operator may tell the scheduler: promises, sizes and the latency model's habits. Plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Seconds, tokens and shares that the policy works with.

    Raises:
        ValueError: a value is outside of its range.
    """

    itl_seconds: float = 0.25  # the inter-token promise: no planned iteration is longer while training could give way
    ttft_seconds: float = 0.0  # promised to an interactive first token; 0: looser promises between tokens plan nothing
    arrival_share: float = 0.25  # of that: an iteration of streams with looser promises, because somebody may arrive
    max_chunk: int = 512  # prefill tokens of one iteration, all requests together
    min_chunk: int = 16  # prefill tokens that run even over budget when a first token would otherwise be late
    head_rows: int = 64  # label rows that go through the head in one batch
    min_window: int = 8  # the smallest training window cut to fit beside inference
    max_units: int = 256  # training units of one iteration
    floor_share: float = 0.02  # share of time the oldest sweep of a priority gets even when the budget has no room
    drain_after: float = 1.0  # seconds blocked by residency after which an adapter's oldest request claims a place
    credit: float = 1.0  # seconds, by weight, that a tenant may be behind the others when it comes back
    remembered: float = 60.0  # seconds for which the promises of a tenant that has gone are still protected
    crowd_share: float = 0.6  # of the inter-token promise: what decodes may take before a tenant's own crowd waits
    training_share: float = 0.8  # of the same: what iterations that train may take while several tenants ask
    decode_reserve: float = 0.25  # blocks a running request that admission leaves, while nobody knows how outputs get
    known_outputs: int = 32  # that must have ended before admission goes by their lengths
    surprise: float = 0.5  # standard deviations of what running streams will need, that admission leaves as well
    memory_claim_after: float = 5.0  # seconds without any memory for training after which a step claims its own
    quantile: float = 0.99  # of recent iterations beside streams, that end within their upper estimate
    prompt_quantile: float = 0.9  # the same, of prompts' iterations while they are being cut
    margin_share: float = 0.75  # of the budget's room beside the requests: the most that training leaves for surprises
    layer_windows: tuple[int | None, ...] = ()  # tokens each layer attends to at most (None: all); empty: all of them
    graph_rows: tuple[int, ...] = ()  # rising; decode rows alone are filled up to one of these and replayed as a graph
    usual_pages: int = 1  # adapter pages of an adapter of usual size
    forgetting: float = 0.98  # of the latency model: the weight that is left of an observation after the next one

    def __post_init__(self) -> None:
        for name in ("itl_seconds", "max_chunk", "min_chunk", "head_rows", "min_window", "max_units", "usual_pages"):
            if getattr(self, name) <= 0:
                raise ValueError(f"scheduler setting {name} must be positive, got {getattr(self, name)}")
        for name in ("ttft_seconds", "memory_claim_after"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"scheduler setting {name} must not be negative, got {getattr(self, name)}")
        for name in ("floor_share", "arrival_share", "margin_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"scheduler setting {name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("quantile", "prompt_quantile"):
            if not 0.5 <= getattr(self, name) < 1.0:
                raise ValueError(f"scheduler setting {name} must be in [0.5, 1), got {getattr(self, name)}")
        if not 0.5 < self.forgetting <= 1.0:
            raise ValueError(f"scheduler setting forgetting must be in (0.5, 1], got {self.forgetting}")
        if any(window is not None and window <= 0 for window in self.layer_windows):
            raise ValueError(f"scheduler setting layer_windows must be positive or None, got {self.layer_windows}")
        if list(self.graph_rows) != sorted({rows for rows in self.graph_rows if rows > 0}):
            raise ValueError(f"scheduler setting graph_rows must be positive and rising, got {self.graph_rows}")
        if self.min_chunk > self.max_chunk:
            raise ValueError(f"min_chunk ({self.min_chunk}) must not exceed max_chunk ({self.max_chunk})")
