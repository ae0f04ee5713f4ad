"""One finetuning job between the engine's sweeps: it says which rows come next, takes gradients, and keeps the records.

It never runs the model. Everything that happened is in the event file; everything needed to go on is in the newest
checkpoint; a job that was killed at any point and opened again ends with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from coserve.server.training.batches import Batch, BatchSource, WorkLeft
from coserve.server.training.events import Record
from coserve.server.training.opening import (
    NO_ROOM,
    JobError,
    JobOver,
    Opened,
    open_parts,
    opening_failure,
    record_failure,
)
from coserve.server.training.optimizer import AdamW, lr_at
from coserve.server.training.peft.lora import LoraPair
from coserve.server.training.peft.sites import Site
from coserve.server.training.progress import Evaluation, Progress
from coserve.server.training.records import JobRecords, OnEvent

log = logging.getLogger("coserve.training")

MAX_CONSECUTIVE_SKIPS = 5
__all__ = ["JobError", "JobOver", "TrainingJob"]


class TrainingJob:
    """A job's state machine.

    state: "running" | "paused" | "cancelled" | "finished" | "failed". A batch from `next_batch` stays the next one
    until it is reported by `finish_train` or `finish_eval`; dropping it halfway (pause, restart) costs nothing else.
    `params` are the master weights: float32, or float64 under a float64 model. They change in `finish_train` only.
    """

    def __init__(self, parts: Opened, data_dir: Path, base_digest: str, base_model_name: str,
                 on_event: OnEvent | None) -> None:  # fmt: skip
        self.spec = parts.spec
        self.job_id = parts.spec.job_id
        self.tenant = parts.spec.tenant
        self.priority = parts.spec.training.priority
        self.config = parts.config
        self.params = parts.params
        self.state = "running"
        self.paused_reason: str | None = None  # "storage_full", or None for a pause that was asked for
        self._base_digest = base_digest
        self._base_model_name = base_model_name
        self._source: BatchSource = parts.source
        self._progress: Progress = parts.progress
        self._evaluation = Evaluation()
        self._optimizer = AdamW(parts.params, parts.spec.training)
        self._optimizer.restore(parts.optimizer)
        self._records = JobRecords(
            data_dir,
            self.job_id,
            parts.log,
            parts.store,
            parts.announced,
            parts.spec.training.keep_checkpoints,
            on_event,
        )

    @classmethod
    def open(
        cls,
        data_dir: Path,
        job_id: str,
        sites: Sequence[Site],
        base_digest: str,
        device: torch.device | str,
        compute_dtype: torch.dtype,
        *,
        on_event: OnEvent | None = None,
        base_model_name: str = "base",
        vocab_size: int | None = None,
    ) -> TrainingJob:
        """Begin the job in jobs/<job_id>/, or go on from its newest whole checkpoint.

        Raises JobOver when its events say that it has ended, and JobError when it cannot run; the latter is also
        written to its events, as "failed" (or, with code "storage_full", as "paused").
        """
        folder = data_dir / "jobs" / job_id
        try:
            parts = open_parts(data_dir, job_id, sites, base_digest, device, compute_dtype, vocab_size)
            job = cls(parts, data_dir, base_digest, base_model_name, on_event)
        except JobOver:
            raise
        except Exception as error:
            failure = opening_failure(error)
            if folder.is_dir():
                record_failure(folder / "events.jsonl", job_id, on_event, failure)
            if failure is error:
                raise
            raise failure from error
        job._begin(parts)
        return job

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return self._progress.step

    @property
    def total_steps(self) -> int:
        return self._source.total_steps

    @property
    def trained_tokens(self) -> int:
        return self._progress.trained_tokens

    @property
    def held_bytes(self) -> int:
        """On the device: of the masters and of the optimizer's state. May be asked while the job's side work runs."""
        return self._optimizer.held_bytes

    def work_left(self, batch: Batch | None) -> WorkLeft:
        """What is still to run beyond `batch`, the newest that was begun. May be asked while the job's side work runs,
        and so before `batch` has been reported, and after."""
        step, evaluated = self.step, None
        if self._progress.open_step is not None:
            evaluated = self._evaluation.rows
            if batch is not None and batch.kind == "eval":
                evaluated = max(evaluated, batch.rows[-1].sequence + 1)
        begun = max(step, batch.step) if batch is not None else step
        return self._source.work_left(begun, step, evaluated)

    # ------------------------------------------------------------------ work

    def next_batch(self) -> Batch | None:
        """The rows to run now; None when the job is not running (it may finish, or pause, in this call)."""
        if self.state == "running":
            self._flush()
        while self.state == "running":
            if self._progress.open_step is not None:
                batch = self._source.evaluation(self.step, self._evaluation.rows)
                if batch is not None:
                    return batch
                self._close_evaluation()
            elif self.step >= self.total_steps or self._out_of_patience():
                self._finish()
            else:
                batch = self._source.train(self.step + 1)
                if batch.loss_tokens:
                    return batch
                self._skip(batch, "no_loss_tokens", "none of its tokens bears loss")
        return None

    def finish_train(self, batch: Batch, grads: Mapping[str, LoraPair], loss_sum: float, correct: int) -> None:
        """Report an optimizer step: `grads` of the mean loss over batch.loss_tokens, the sum of their losses, and how
        many of them the model predicted. A report to a job that is no longer running is dropped.
        """
        if self.state != "running":
            return
        self._expect(batch, "train", self.step + 1)
        norm = self._optimizer.load_gradients(grads)
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            self._optimizer.drop_gradients()
            fault = "gradient" if math.isfinite(loss_sum) else "loss"
            self._skip(batch, f"non_finite_{fault}", f"the {fault} is not finite")
            return
        learning_rate = lr_at(self.step, self.spec.training, self.total_steps)
        if not self._optimizer.step(learning_rate):
            self.fail("loss_diverged", f"Step {batch.step} made the weights infinite; lower the learning rate.")
            return
        metrics = {
            "step": batch.step,
            "total_steps": self.total_steps,
            "train_loss": loss_sum / batch.loss_tokens,
            "train_mean_token_accuracy": correct / batch.loss_tokens,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens": batch.tokens,
            "loss_tokens": batch.loss_tokens,
        }
        self._progress = self._progress.stepped(batch)
        if self._source.evaluation_due(batch.step):
            self._progress = replace(self._progress, open_step=metrics)
            self._evaluation = Evaluation()
        else:
            self._close_step(metrics)

    def finish_eval(self, batch: Batch, loss_sum: float, correct: int) -> None:
        """Report one batch of an evaluation; the last one closes the step."""
        if self.state != "running":
            return
        self._expect(batch, "eval", self.step)
        self._evaluation.add(batch, loss_sum, correct)
        if self._source.evaluation(self.step, self._evaluation.rows) is None:
            self._close_evaluation()

    # ------------------------------------------------------------------ commands

    def pause(self) -> None:
        """Stop after the last whole step, with a checkpoint to go on from. Idempotent."""
        if self.state != "running":
            return
        self.state = "paused"
        self._checkpoint_later()
        self._records.emit_later("paused", "info", "Fine-tuning job paused", {"step": self.step})
        self._flush()

    def checkpoint_now(self) -> None:
        """Keep the progress before the process ends; the job goes on from here when it is opened again."""
        if self.state == "running":
            self._checkpoint_later()
            self._flush()

    def resume(self) -> bool:
        """Go on after a pause in this process: also the retry after "storage_full". Returns whether it runs."""
        if self.state == "paused" and self._flush() and self.state == "paused":
            self.state, self.paused_reason = "running", None
            self._start_later()
            self._flush()
        return self.state == "running"

    def cancel(self) -> None:
        """End without a result; checkpoints stay. Idempotent."""
        if self.state in ("running", "paused"):
            self._end("cancelled", "cancelled", "info", "Fine-tuning job cancelled", {"step": self.step})

    def fail(self, code: str, message: str) -> None:
        """End with an error; the newest checkpoint, if any, stays servable."""
        if self.state in ("running", "paused"):
            data = {"code": code, "message": message, "step": self.step,
                    "checkpoint": self._records.newest_checkpoint()}  # fmt: skip
            self._end("failed", "failed", "error", message, data)

    def warn(self, message: str) -> None:
        """Tell the job's tenant of something that does not end it."""
        if self.state == "running":
            self._records.emit_later("warning", "warn", message, {"step": self.step})
            self._flush()

    def close(self) -> None:
        """Give the event file back; the job must not be used afterwards."""
        self._records.close()

    # ------------------------------------------------------------------ steps

    def _close_evaluation(self) -> None:
        metrics = {**(self._progress.open_step or {}), **self._evaluation.metrics}
        self._progress = self._progress.evaluated(self._evaluation.loss)
        self._close_step(metrics)

    def _close_step(self, metrics: Record) -> None:
        """A step with everything known about it: its event, and what is due after it."""
        shown = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        self._progress = replace(self._progress, metrics={key: metrics[key] for key in shown if key in metrics})
        message = f"Step {metrics['step']}/{self.total_steps}: training loss={metrics['train_loss']:.2f}"
        if "valid_loss" in metrics:
            message += f", validation loss={metrics['valid_loss']:.2f}"
        self._records.emit_later("step", "info", message, metrics)
        self._after_step()

    def _skip(self, batch: Batch, reason: str, why: str) -> None:
        """Leave a step out; the schedule and the data go on without it."""
        self._progress = self._progress.skipped(batch, diverging=reason != "no_loss_tokens")
        skips = self._progress.consecutive_skips
        data = {"step": batch.step, "reason": reason, "consecutive": skips}
        self._records.emit_later("skipped_step", "warn", f"Step {batch.step}/{self.total_steps} skipped: {why}", data)
        if skips >= MAX_CONSECUTIVE_SKIPS:
            self._flush()
            self.fail("loss_diverged", f"The loss or its gradient was not finite in {skips} steps one after the other; "
                      "lower the learning rate, or check the data.")  # fmt: skip
        else:
            self._after_step()

    def _after_step(self) -> None:
        over = self.step >= self.total_steps or self._out_of_patience()
        publish = self._source.publish_due(self.step) and not over
        if publish:
            self._progress = replace(self._progress, published=True)
        if publish or over or self._source.checkpoint_due(self.step):
            self._checkpoint_later()
        if publish:
            self._records.publish_later(self.step)
        self._flush()
        if over and self.state == "running":
            self._finish()

    def _out_of_patience(self) -> bool:
        patience = self.spec.training.early_stopping_patience
        return patience is not None and self._progress.evaluations_without_gain >= patience

    def _finish(self) -> None:
        def done() -> None:
            self.state = "finished"

        self._checkpoint_later()
        self._records.finish_later(self.step, self.trained_tokens, done)
        self._flush()

    def _end(self, state: str, kind: str, level: str, message: str, data: Record) -> None:
        self.state, self.paused_reason = state, None
        self._records.forget_queue()
        self._optimizer.drop_gradients()
        self._records.emit_later(kind, level, message, data)
        self._records.results_later()
        self._flush()

    def _begin(self, parts: Opened) -> None:
        """Tell what opening found, and make up for events that a crash swallowed after their effect."""
        self._records.reconcile_later(parts.dropped)
        self._start_later()
        if self._progress.published and self.step not in parts.published:
            self._records.publish_later(self.step)
        self._flush()

    def _start_later(self) -> None:
        text = "Fine-tuning job started" if self._records.empty else f"Fine-tuning job resumed at step {self.step}"
        data = {"total_steps": self.total_steps, "step": self.step}
        self._records.emit_later("started", "info", text, data)

    def _checkpoint_later(self) -> None:
        self._records.checkpoint_later(
            self._progress, self.config, self.params, self._optimizer, self._base_digest, self._base_model_name
        )

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the adapter and two moments of each weight, and a quarter for the rest."""
        weights = sum(t.numel() * t.element_size() for pair in self.params.values() for t in (pair.a, pair.b))
        return weights * 15 // 4

    def _flush(self) -> bool:
        """Carry out what is due on the disk. No room: the job pauses and keeps the rest. Broken disk: it fails."""
        try:
            if self._records.flush():
                return True
            if self.state == "running":
                self.state, self.paused_reason = "paused", "storage_full"
                data = {"step": self.step, "reason": "storage_full", "needs_bytes": self._checkpoint_bytes()}
                self._emit_if_possible("paused", "warn", NO_ROOM, data)
            elif self.state == "paused":
                self.paused_reason = "storage_full"
        except OSError as error:
            log.error("job %s cannot write its files: %s", self.job_id, error)
            self._records.forget_queue()
            if self.state in ("running", "paused"):
                self.state, self.paused_reason = "failed", None
                message = f"The job's files cannot be written: {error.strerror}."
                self._emit_if_possible("failed", "error", message, {"code": "storage_error", "message": message})
        return False

    def _emit_if_possible(self, kind: str, level: str, message: str, data: Record) -> None:
        """An event about a disk that takes no writes may not be writable itself; the job's state says it too."""
        try:
            self._records.emit(kind, level, message, data)
        except OSError as error:
            log.error("job %s cannot write its event %r: %s", self.job_id, kind, error)

    def _expect(self, batch: Batch, kind: str, step: int) -> None:
        if (batch.kind, batch.step) != (kind, step):
            raise ValueError(f"job {self.job_id} expects {kind} of step {step}, not {batch.kind} of step {batch.step}")
