"""One finetuning job between the engine's sweeps: it says which rows come next, takes gradients, and keeps the records.

It never runs the model. Everything that happened is in the event file; everything needed to go on is in the newest
checkpoint; a job that was killed at any point and opened again ends with the same bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coserve.server.training.batches import Batch, BatchSource
from coserve.server.training.checkpoint import CheckpointState, CheckpointStore, tensors_digest
from coserve.server.training.durable import is_storage_full, replace_file
from coserve.server.training.events import EventLog, Record, result_table
from coserve.server.training.opening import JobError, JobOver, Opened, open_parts
from coserve.server.training.optimizer import AdamW, lr_at
from coserve.server.training.peft.folder import version_digest
from coserve.server.training.peft.lora import LoraPair
from coserve.server.training.peft.sites import Site

MAX_CONSECUTIVE_SKIPS = 5
PUBLISHED_KEPT = 2  # published folders outlive pruning until two newer ones are there: their readers may be late

OnEvent = Callable[[str, int, Record], None]

__all__ = ["JobError", "JobOver", "TrainingJob"]


class TrainingJob:
    """A job's state machine.

    state: "running" | "paused" | "cancelled" | "finished" | "failed". A batch from `next_batch` stays the next one
    until it is reported by `finish_train` or `finish_eval`; dropping it halfway (pause, restart) costs nothing else.
    `params` are the master weights: float32, or float64 under a float64 model. They change in `finish_train` only.
    """

    def __init__(self, parts: Opened, data_dir: Path, base_digest: str, base_model_name: str, weight: float,
                 on_event: OnEvent | None) -> None:  # fmt: skip
        self.spec = parts.spec
        self.job_id = parts.spec.job_id
        self.tenant = parts.spec.tenant
        self.priority = parts.spec.training.priority
        self.weight = weight
        self.config = parts.config
        self.params = parts.params
        self.state = "running"
        self.paused_reason: str | None = None  # "storage_full", or None for a pause that was asked for
        self._data_dir = data_dir
        self._base_digest = base_digest
        self._base_model_name = base_model_name
        self._on_event = on_event
        self._log: EventLog = parts.log
        self._store: CheckpointStore = parts.store
        self._source: BatchSource = parts.source
        self._progress: CheckpointState = parts.progress
        self._optimizer = AdamW(parts.params, parts.spec.training)
        self._optimizer.restore(parts.optimizer)
        # Effects on the disk that are still to happen, in order. One that fails for lack of room stays in front.
        self._effects: deque[Callable[[], None]] = deque()
        self._announced = set(parts.announced)  # steps whose checkpoint event stands
        self._begin_evaluation()

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
        weight: float = 1.0,
    ) -> TrainingJob:
        """Begin the job in jobs/<job_id>/, or go on from its newest whole checkpoint.

        Raises JobOver when its events say that it has ended, and JobError when it cannot run; the latter is also
        written to its events, as "failed".
        """
        folder = data_dir / "jobs" / job_id
        try:
            parts = open_parts(data_dir, job_id, sites, base_digest, device, compute_dtype, vocab_size)
        except JobError as error:
            if folder.is_dir():
                _record_failure(folder / "events.jsonl", job_id, error, on_event)
            raise
        job = cls(parts, data_dir, base_digest, base_model_name, weight, on_event)
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

    # ------------------------------------------------------------------ work

    def next_batch(self) -> Batch | None:
        """The rows to run now; None when the job is not running (it may finish, or pause, in this call)."""
        if self.state == "running":
            self._run_effects()
        while self.state == "running":
            if self._progress.open_step is not None:
                batch = self._source.evaluation(self.step, self._evaluated_rows)
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
        self._progress = replace(
            self._progress,
            step=batch.step,
            trained_tokens=self.trained_tokens + batch.tokens,
            consecutive_skips=0,
            published=False,
        )
        if self._source.evaluation_due(batch.step):
            self._progress = replace(self._progress, open_step=metrics)
            self._begin_evaluation()
        else:
            self._close_step(metrics)

    def finish_eval(self, batch: Batch, loss_sum: float, correct: int) -> None:
        """Report one batch of an evaluation; the last one closes the step."""
        if self.state != "running":
            return
        self._expect(batch, "eval", self.step)
        self._evaluated_rows += len(batch.rows)
        self._eval_loss_sum += loss_sum
        self._eval_correct += correct
        self._eval_tokens += batch.loss_tokens
        if self._source.evaluation(self.step, self._evaluated_rows) is None:
            self._close_evaluation()

    # ------------------------------------------------------------------ commands

    def pause(self) -> None:
        """Stop after the last whole step, with a checkpoint to go on from. Idempotent."""
        if self.state != "running":
            return
        self.state = "paused"
        self._effects.append(self._write_checkpoint)
        self._emit_later("paused", "info", "Fine-tuning job paused", {"step": self.step})
        self._run_effects()

    def checkpoint_now(self) -> None:
        """Keep the progress before the process ends; the job goes on from here when it is opened again."""
        if self.state == "running":
            self._effects.append(self._write_checkpoint)
            self._run_effects()

    def resume(self) -> bool:
        """Go on after a pause in this process: also the retry after "storage_full". Returns whether it runs."""
        self._run_effects()
        if self.state == "paused" and not self._effects:
            self.state, self.paused_reason = "running", None
            self._emit_later("started", "info", f"Fine-tuning job resumed at step {self.step}", self._start_data())
            self._run_effects()
        return self.state == "running"

    def cancel(self) -> None:
        """End without a result; checkpoints stay. Idempotent."""
        if self.state in ("running", "paused"):
            self._end("cancelled", "cancelled", "info", "Fine-tuning job cancelled", {"step": self.step})

    def fail(self, code: str, message: str) -> None:
        """End with an error; the newest checkpoint, if any, stays servable."""
        if self.state in ("running", "paused"):
            steps = self._store.steps()
            last = self._relative(self._store.path(steps[-1])) if steps else None
            data = {"code": code, "message": message, "step": self.step, "checkpoint": last}
            self._end("failed", "failed", "error", message, data)

    def close(self) -> None:
        """Give the event file back; the job must not be used afterwards."""
        self._log.close()

    # ------------------------------------------------------------------ steps

    def _begin_evaluation(self) -> None:
        self._evaluated_rows = 0
        self._eval_loss_sum = 0.0
        self._eval_correct = 0
        self._eval_tokens = 0

    def _close_evaluation(self) -> None:
        metrics = dict(self._progress.open_step or {})
        best, waited = self._progress.best_valid_loss, self._progress.evaluations_without_gain
        valid_loss = self._eval_loss_sum / self._eval_tokens if self._eval_tokens else math.nan
        if math.isfinite(valid_loss):
            metrics["valid_loss"] = valid_loss
            metrics["valid_mean_token_accuracy"] = self._eval_correct / self._eval_tokens
        if best is None or valid_loss < best:
            best, waited = (valid_loss if math.isfinite(valid_loss) else best), 0
        else:
            waited += 1
        self._progress = replace(
            self._progress, open_step=None, best_valid_loss=best, evaluations_without_gain=waited
        )  # fmt: skip
        self._close_step(metrics)

    def _close_step(self, metrics: Record) -> None:
        """A step with everything known about it: its event, and what is due after it."""
        shown = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        self._progress = replace(self._progress, metrics={key: metrics[key] for key in shown if key in metrics})
        message = f"Step {metrics['step']}/{self.total_steps}: training loss={metrics['train_loss']:.2f}"
        if "valid_loss" in metrics:
            message += f", validation loss={metrics['valid_loss']:.2f}"
        self._emit_later("step", "info", message, metrics)
        self._after_step()

    def _skip(self, batch: Batch, reason: str, why: str) -> None:
        """Leave a step out; the schedule and the data go on without it."""
        diverging = reason != "no_loss_tokens"
        skips = self._progress.consecutive_skips + diverging
        self._progress = replace(
            self._progress,
            step=batch.step,
            trained_tokens=self.trained_tokens + batch.tokens,
            consecutive_skips=skips,
            published=False,
        )
        data = {"step": batch.step, "reason": reason, "consecutive": skips}
        self._emit_later("skipped_step", "warn", f"Step {batch.step}/{self.total_steps} skipped: {why}", data)
        if skips >= MAX_CONSECUTIVE_SKIPS:
            self._run_effects()
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
            self._effects.append(self._write_checkpoint)
        if publish:
            self._effects.append(self._publish)
        self._run_effects()
        if over and self.state == "running":
            self._finish()

    def _out_of_patience(self) -> bool:
        patience = self.spec.training.early_stopping_patience
        return patience is not None and self._progress.evaluations_without_gain >= patience

    def _finish(self) -> None:
        self._effects.append(self._write_checkpoint)
        self._effects.append(self._write_results)
        self._effects.append(self._emit_finished)
        self._run_effects()

    def _end(self, state: str, kind: str, level: str, message: str, data: Record) -> None:
        self.state, self.paused_reason = state, None
        self._effects.clear()
        self._optimizer.drop_gradients()
        self._emit_later(kind, level, message, data)
        self._effects.append(self._write_results)
        self._run_effects()

    def _begin(self, parts: Opened) -> None:
        """Tell what opening found, and make up for events that a crash swallowed after their effect."""
        for step, why in parts.dropped.items():
            self._emit_later("warning", "warn", f"Checkpoint of step {step} is damaged and was removed: {why}",
                             {"step": step})  # fmt: skip
        on_disk = set(self._store.steps())
        for step in sorted(parts.announced - on_disk):
            self._emit_later("pruned", "info", f"Checkpoint of step {step} removed",
                             {"step": step, "path": self._relative(self._store.path(step))})  # fmt: skip
        for step in sorted(on_disk - parts.announced):
            self._effects.append(partial(self._announce, step))
        first = self._log.last is None
        text = "Fine-tuning job started" if first else f"Fine-tuning job resumed at step {self.step}"
        self._emit_later("started", "info", text, self._start_data())
        if self._progress.published and self.step not in parts.published:
            self._effects.append(self._publish)
        self._run_effects()

    def _start_data(self) -> Record:
        return {"total_steps": self.total_steps, "step": self.step}

    # ------------------------------------------------------------------ effects

    def _run_effects(self) -> None:
        """Carry out what is pending, in order; without room on the disk the job pauses and keeps the rest."""
        while self._effects:
            try:
                self._effects[0]()
            except OSError as error:
                if not is_storage_full(error):
                    raise
                self._pause_for_room()
                return
            self._effects.popleft()

    def _pause_for_room(self) -> None:
        was_running = self.state == "running"
        if was_running or self.state == "paused":
            self.state, self.paused_reason = "paused", "storage_full"
        if was_running:
            try:
                self._emit("paused", "warn", "Fine-tuning job paused: no room left on the disk",
                           {"step": self.step, "reason": "storage_full"})  # fmt: skip
            except OSError as error:
                if not is_storage_full(error):
                    raise
                # not even room for this line: `paused_reason` is all there is until resume() succeeds

    def _write_checkpoint(self) -> None:
        """A checkpoint of the current step, if it has none; it is announced once it is durable."""
        step = self.step
        if step == 0:
            return  # the initial weights are a function of the spec
        if self._store.resumable(step):
            kept = self._store.state(step)
            self._store.update_state(replace(
                self._progress, digest=kept.digest, optimizer_digest=kept.optimizer_digest,
                published=kept.published or self._progress.published,
            ))  # fmt: skip
        else:
            optimizer = self._optimizer.state_tensors()
            state = replace(
                self._progress,
                digest=version_digest(self._base_digest, self.config, self.params),
                optimizer_digest=tensors_digest(optimizer),
            )
            self._store.write(
                state, self.config, self.params, optimizer,
                base_digest=self._base_digest, base_model_name=self._base_model_name,
            )  # fmt: skip
        if step not in self._announced:
            # this effect stands in front; what follows from it comes before everything else that is pending
            self._effects.insert(1, partial(self._announce, step))
            self._effects.insert(2, self._prune)

    def _announce(self, step: int) -> None:
        state = self._store.state(step)
        data = {"step": step, "path": self._relative(self._store.path(step)), "digest": state.digest,
                "metrics": state.metrics, "resumable": self._store.resumable(step)}  # fmt: skip
        self._emit("checkpoint", "info", f"Checkpoint created at step {step}", data)
        self._announced.add(step)

    def _prune(self) -> None:
        published = [step for step in self._store.steps() if self._store.state(step).published]
        for step in self._store.prune(self.spec.training.keep_checkpoints, frozenset(published[-PUBLISHED_KEPT:])):
            self._emit("pruned", "info", f"Checkpoint of step {step} removed",
                       {"step": step, "path": self._relative(self._store.path(step))})  # fmt: skip

    def _publish(self) -> None:
        state = self._store.state(self.step)
        data = {"step": self.step, "path": self._relative(self._store.path(self.step)), "digest": state.digest}
        self._emit("published", "info", f"Adapter of step {self.step} published", data)

    def _write_results(self) -> None:
        replace_file(self._data_dir / self._result_path(), result_table(self._log.records()).encode())

    def _emit_finished(self) -> None:
        step = self.step
        path, digest = self._relative(self._store.path(step)), self._store.state(step).digest
        data = {"step": step, "path": path, "digest": digest, "trained_tokens": self.trained_tokens,
                "result_file": self._result_path()}  # fmt: skip
        self._emit("finished", "info", "The job has successfully completed", data)
        self.state = "finished"

    def _emit_later(self, kind: str, level: str, message: str, data: Record) -> None:
        self._effects.append(lambda: self._emit(kind, level, message, data))

    def _emit(self, kind: str, level: str, message: str, data: Record) -> None:
        seq, record = self._log.append(kind, level, message, data)
        if self._on_event is not None:
            self._on_event(self.job_id, seq, record)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._data_dir).as_posix()

    def _result_path(self) -> str:
        return f"jobs/{self.job_id}/result.csv"

    def _expect(self, batch: Batch, kind: str, step: int) -> None:
        if (batch.kind, batch.step) != (kind, step):
            raise ValueError(f"job {self.job_id} expects {kind} of step {step}, not {batch.kind} of step {batch.step}")


def _record_failure(path: Path, job_id: str, error: JobError, on_event: OnEvent | None) -> None:
    log = EventLog(path)
    try:
        data: dict[str, Any] = {"code": error.code, "message": error.message}
        seq, record = log.append("failed", "error", error.message, data)
    finally:
        log.close()
    if on_event is not None:
        on_event(job_id, seq, record)
