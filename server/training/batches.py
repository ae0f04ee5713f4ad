"""Which rows the engine runs next for a job: the rows of an optimizer step, or a part of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coserve.server.training.dataset import TokenRows, loss_positions, order, steps_per_epoch, total_steps
from coserve.server.training.spec import JobSpec

DEFAULT_CHECKPOINT_STEPS = 100


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One sequence of a batch."""

    sequence: int  # its place in the step (or in the evaluation): with the step, the key of its random numbers
    index: int  # its row in the token file
    input_ids: np.ndarray  # int64 [N]
    labels: np.ndarray  # int64 [N], aligned with input_ids; -100 bears no loss, labels[0] never does


@dataclass(frozen=True, slots=True)
class Batch:
    """What the engine runs as a whole before it reports back."""

    kind: str  # "train": one optimizer step | "eval": no gradients
    step: int  # the optimizer step, from 1, that this is, or that this evaluates
    rows: tuple[TrainRow, ...]
    loss_tokens: int  # positions that bear loss, over all rows

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class WorkLeft:
    """What a job still has to run, as its rows are on average. Counts are tokens."""

    step_tokens: float  # of an ordinary optimizer step
    tokens: float  # to train
    eval_tokens: float  # to evaluate
    bearing: float  # the part of training tokens that bears loss
    eval_bearing: float


class BatchSource:
    """Cuts a job's rows into batches: a function of the spec and the rows, without any state that matters."""

    def __init__(self, spec: JobSpec, train: TokenRows, valid: TokenRows | None) -> None:
        self._spec = spec
        self._train = train
        self._valid = valid
        self._epoch_order: tuple[int, np.ndarray] | None = None  # the last epoch's: sorting it anew each step is slow
        training = spec.training
        self.steps_per_epoch = steps_per_epoch(len(train), training.step_rows)
        self.total_steps = total_steps(len(train), training.step_rows, training.n_epochs, training.max_steps)

    def work_left(self, begun: int, done: int, evaluated: int | None) -> WorkLeft:
        """What comes after `begun` steps, of which `done` are done. `evaluated`: validation rows that have run, where
        an evaluation is under way. Early stopping is not foreseen."""
        train, valid = self._train, self._valid
        step_tokens, evaluations = train.tokens / self.steps_per_epoch, 0.0
        if valid is not None:
            every = self._evaluate_every()
            evaluations += self.total_steps // every - done // every
            evaluations += done < self.total_steps and self.total_steps % every > 0
            evaluations += 0.0 if evaluated is None else max(0.0, 1.0 - evaluated / len(valid))
        return WorkLeft(
            step_tokens,
            (self.total_steps - begun) * step_tokens,
            0.0 if valid is None else evaluations * valid.tokens,
            train.loss_tokens / train.tokens,
            0.0 if valid is None else valid.loss_tokens / valid.tokens,
        )

    def train(self, step: int) -> Batch:
        """The rows of optimizer step `step`, from 1; the last step of an epoch may have fewer."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            rows = order(len(self._train), self._spec.seed, epoch, self._spec.training.shuffle)
            self._epoch_order = epoch, rows
        size = self._spec.training.step_rows
        return _batch("train", step, self._train, self._epoch_order[1][place * size : (place + 1) * size], 0)

    def evaluation(self, step: int, first_row: int) -> Batch | None:
        """The validation rows from `first_row` on, as many as a step has; None behind the last."""
        if self._valid is None or first_row >= len(self._valid):
            return None
        stop = min(first_row + self._spec.training.step_rows, len(self._valid))
        return _batch("eval", step, self._valid, np.arange(first_row, stop), first_row)

    def evaluation_due(self, step: int) -> bool:
        """After every `eval_every` steps, else after every epoch; and always at the end."""
        if self._valid is None:
            return False
        return step % self._evaluate_every() == 0 or step == self.total_steps

    def _evaluate_every(self) -> int:
        return self._spec.training.eval_every or self.steps_per_epoch

    def checkpoint_due(self, step: int) -> bool:
        """After every `checkpoint_every` steps, else after every epoch and at least every hundred steps."""
        every = self._spec.training.checkpoint_every
        if every:
            return step % every == 0
        return step % DEFAULT_CHECKPOINT_STEPS == 0 or step % self.steps_per_epoch == 0

    def publish_due(self, step: int) -> bool:
        every = self._spec.training.publish_every
        return every is not None and step % every == 0


def _batch(kind: str, step: int, source: TokenRows, indices: np.ndarray, first_sequence: int) -> Batch:
    rows = []
    for sequence, index in enumerate(indices.tolist(), first_sequence):
        input_ids, labels = source.row(index)
        rows.append(TrainRow(sequence, index, input_ids, labels))
    return Batch(kind, step, tuple(rows), sum(loss_positions(row.labels) for row in rows))
