"""What every iteration carried: the last 2,000 records, the counters that only grow, and the open promise samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from coserve.scheduler.state import Plan

KINDS = ("decode", "prefill", "train_forward", "head", "train_backward")
_MOVES = {move: f'coserve_sweep_moves_total{{move="{move}"}}' for move in ("lean", "park", "place")}
_AHEAD = {used: f'coserve_plans_ahead_total{{used="{used}"}}' for used in ("yes", "no")}
_KEPT = 2000


@dataclass(slots=True)
class Work:
    """Tokens of one iteration by kind. `train_backward` counts layer-tokens ÷ layers."""

    decode: int = 0
    prefill: int = 0
    train_forward: float = 0
    head: int = 0
    train_backward: float = 0
    units: int = 0
    adapters: set[str] = field(default_factory=set)

    def tokens(self) -> dict[str, float]:
        return {kind: round(getattr(self, kind), 6) for kind in KINDS}


class IterationLog:
    """Ledger of iterations. Times are the caller's monotonic seconds; `started_at` is wall-clock time."""

    def __init__(self, engine_pid: int) -> None:
        self._pid = engine_pid
        self._records: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._seq = 0
        self.counters: dict[str, float] = {f'coserve_step_tokens_total{{kind="{kind}"}}': 0.0 for kind in KINDS}
        self.counters |= dict.fromkeys(
            ("coserve_iterations_total", "coserve_iterations_with_streams_total", "coserve_iterations_in_slo_total",
             "coserve_preemptions_total", "coserve_recomputed_tokens_total", "coserve_busy_seconds_total",
             *_AHEAD.values(), *_MOVES.values()), 0.0,
        )  # fmt: skip
        self._itl: list[tuple[str, float]] = []
        self._ttft: list[tuple[str, float]] = []

    def record(
        self, work: Work, *, started_at: float, predicted: float, upper: float, measured: float, budget: float,
        streams: bool,
    ) -> None:  # fmt: skip
        """`predicted`: the mean; `upper`: the estimate that was held against the budget. Seconds."""
        self._seq += 1
        tokens = work.tokens()
        self._records.append(
            {"seq": self._seq, "started_at": started_at, "tokens": tokens, "units": work.units,
             "adapters": sorted(work.adapters), "predicted_s": predicted, "upper_s": upper,
             "measured_s": measured, "slo_budget_s": budget, "streams": streams, "engine_pid": self._pid}
        )  # fmt: skip
        for kind, count in tokens.items():
            self.counters[f'coserve_step_tokens_total{{kind="{kind}"}}'] += count
        self.counters["coserve_iterations_total"] += 1
        self.counters["coserve_busy_seconds_total"] += measured
        if streams:
            self.counters["coserve_iterations_with_streams_total"] += 1
            self.counters["coserve_iterations_in_slo_total"] += measured <= budget

    def count_ahead(self, used: bool) -> None:
        """A plan was made while the iteration before it ran."""
        self.counters[_AHEAD["yes" if used else "no"]] += 1

    def count_moves(self, plan: Plan) -> None:
        """Of sweeps, between memory and host."""
        for move, sweeps in (("lean", plan.lean), ("park", plan.park), ("place", plan.place)):
            self.counters[_MOVES[move]] += len(sweeps)

    def latest(self, limit: int) -> tuple[dict[str, Any], ...]:
        """The newest `limit` records, oldest first."""
        return tuple(self._records)[-limit:] if limit > 0 else ()

    def sample_itl(self, slo_class: str, seconds: float) -> None:
        self._itl.append((slo_class, seconds))

    def sample_ttft(self, slo_class: str, seconds: float) -> None:
        self._ttft.append((slo_class, seconds))

    def take_samples(self) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
        """(itl, ttft) since the last call."""
        taken = tuple(self._itl), tuple(self._ttft)
        self._itl, self._ttft = [], []
        return taken
