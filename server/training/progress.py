"""How far a job is: everything of it that is not a tensor, as its checkpoints keep it in state.json.

A value that is replaced, never changed. `Evaluation` is the part that no checkpoint keeps: one that was broken off
begins anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from coserve.server.training.batches import Batch


@dataclass(frozen=True, slots=True)
class Progress:
    """After `step` optimizer steps."""

    step: int  # optimizer steps done, skipped ones included
    digest: str  # version digest of the adapter
    optimizer_digest: str
    trained_tokens: int
    consecutive_skips: int = 0
    best_valid_loss: float | None = None
    evaluations_without_gain: int = 0
    published: bool = False  # became, or is about to become, a version of the adapter
    open_step: dict[str, Any] | None = None  # a step whose evaluation is still to come
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last step, as a checkpoint shows them

    def stepped(self, batch: Batch) -> Progress:
        """An optimizer step was taken."""
        return self._past(batch, 0)

    def skipped(self, batch: Batch, *, diverging: bool) -> Progress:
        """A step was left out; only those whose values were not finite count as skips in a row."""
        return self._past(batch, self.consecutive_skips + diverging)

    def evaluated(self, valid_loss: float) -> Progress:
        """The open step's evaluation is over; a loss that is not finite is no gain."""
        best = self.best_valid_loss
        if best is not None and not valid_loss < best:
            return replace(self, open_step=None, evaluations_without_gain=self.evaluations_without_gain + 1)
        best = valid_loss if math.isfinite(valid_loss) else best
        return replace(self, open_step=None, best_valid_loss=best, evaluations_without_gain=0)

    def _past(self, batch: Batch, consecutive_skips: int) -> Progress:
        trained = self.trained_tokens + batch.tokens
        return replace(
            self, step=batch.step, trained_tokens=trained, consecutive_skips=consecutive_skips, published=False
        )


@dataclass(slots=True)
class Evaluation:
    """Sums over the rows of the validation data that have run."""

    rows: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    loss_tokens: int = 0

    def add(self, batch: Batch, loss_sum: float, correct: int) -> None:
        self.rows += len(batch.rows)
        self.loss_sum += loss_sum
        self.correct += correct
        self.loss_tokens += batch.loss_tokens

    @property
    def loss(self) -> float:
        """The mean; NaN where nothing bore a loss."""
        return self.loss_sum / self.loss_tokens if self.loss_tokens else math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """What a step's record says of it; nothing if the loss is not finite."""
        if not math.isfinite(self.loss):
            return {}
        return {"valid_loss": self.loss, "valid_mean_token_accuracy": self.correct / self.loss_tokens}
