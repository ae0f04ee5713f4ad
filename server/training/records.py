"""What a job leaves on the disk, in order: events, checkpoints, published versions, the result table.

Effects wait in a queue and are carried out one by one; one that finds no room on the disk stays in front, so that
nothing is lost or told twice when there is room again. No decision about training is made here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from coserve.server.training.checkpoint import CheckpointError, CheckpointStore, tensors_digest
from coserve.server.training.durable import is_storage_full, replace_file
from coserve.server.training.events import EventLog, Record, result_table
from coserve.server.training.optimizer import AdamW
from coserve.server.training.peft.folder import version_digest
from coserve.server.training.peft.lora import LoraConfig, LoraWeights
from coserve.server.training.progress import Progress

PUBLISHED_KEPT = 2  # published folders outlive pruning until two newer ones are there: their readers may be late

OnEvent = Callable[[str, int, Record], None]


class JobRecords:
    """The files of one job. Methods whose names end in `_later` queue an effect; `flush` carries the queue out."""

    def __init__(
        self,
        data_dir: Path,
        job_id: str,
        log: EventLog,
        store: CheckpointStore,
        announced: Iterable[int],
        keep_checkpoints: int,
        on_event: OnEvent | None,
    ) -> None:
        self._data_dir = data_dir
        self._job_id = job_id
        self._log = log
        self._store = store
        self._announced = set(announced)  # steps whose checkpoint event stands
        self._keep = keep_checkpoints
        self._on_event = on_event
        self._effects: deque[Callable[[], None]] = deque()

    @property
    def empty(self) -> bool:
        """Whether the job has no event yet."""
        return self._log.last is None

    def flush(self) -> bool:
        """Carry out what is queued; False when the disk has no room for the rest. Raises any other OSError."""
        while self._effects:
            try:
                self._effects[0]()
            except OSError as error:
                if not is_storage_full(error):
                    raise
                return False
            self._effects.popleft()
        return True

    def forget_queue(self) -> None:
        """Drop what is queued: the job has ended in another way."""
        self._effects.clear()

    def close(self) -> None:
        self._log.close()

    # ------------------------------------------------------------------ events

    def emit(self, kind: str, level: str, message: str, data: Record) -> None:
        """Append an event now, ahead of the queue. Raises OSError."""
        seq, record = self._log.append(kind, level, message, data)
        if self._on_event is not None:
            self._on_event(self._job_id, seq, record)

    def emit_later(self, kind: str, level: str, message: str, data: Record) -> None:
        self._effects.append(partial(self.emit, kind, level, message, data))

    def reconcile_later(self, dropped: dict[int, str]) -> None:
        """Tell of checkpoints that were found damaged, and make up for events that a crash swallowed.

        `dropped` maps the steps of removed checkpoints to the reasons.
        """
        for step, why in dropped.items():
            message = f"Checkpoint of step {step} is damaged and was removed: {why}"
            self.emit_later("warning", "warn", message, {"step": step})
        on_disk = set(self._store.steps())
        for step in sorted(self._announced - on_disk):
            self._effects.append(partial(self._tell_pruned, step))
        for step in sorted(on_disk - self._announced):
            self._effects.append(partial(self._announce, step))

    # ------------------------------------------------------------------ checkpoints

    def newest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint, relative to the data directory."""
        steps = self._store.steps()
        return self._path(steps[-1]) if steps else None

    def checkpoint_later(
        self, progress: Progress, config: LoraConfig, params: LoraWeights, optimizer: AdamW,
        base_digest: str, base_model_name: str,
    ) -> None:  # fmt: skip
        """Store a checkpoint of progress.step; `params` and `optimizer` must not change before the flush.

        Nothing is stored for step 0: the initial weights are a function of the job's spec.
        """
        if progress.step:
            self._effects.append(
                partial(self._write, progress, config, params, optimizer, base_digest, base_model_name)
            )

    def publish_later(self, step: int) -> None:
        """Tell that the checkpoint of `step` is to become a version of the job's adapter."""
        self._effects.append(partial(self._publish, step))

    def finish_later(self, step: int, trained_tokens: int, done: Callable[[], None]) -> None:
        """The result table and the last event, both after the checkpoint of `step`; then `done()`."""
        self.results_later()
        self._effects.append(partial(self._finish, step, trained_tokens))
        self._effects.append(done)

    def results_later(self) -> None:
        self._effects.append(self._write_results)

    def _write(
        self, progress: Progress, config: LoraConfig, params: LoraWeights, optimizer: AdamW,
        base_digest: str, base_model_name: str,
    ) -> None:  # fmt: skip
        step = progress.step
        if self._store.resumable(step):  # a pause before this step's evaluation: the tensors are there already
            kept = self._store.state(step)
            self._store.update_state(
                replace(
                    progress,
                    digest=kept.digest,
                    optimizer_digest=kept.optimizer_digest,
                )
            )
        else:
            tensors = optimizer.state_tensors()
            digest = version_digest(base_digest, config, params)
            state = replace(progress, digest=digest, optimizer_digest=tensors_digest(tensors))
            self._store.write(state, config, params, tensors, base_digest=base_digest, base_model_name=base_model_name)
        if step not in self._announced:
            # this effect still stands in front; what follows from it goes before everything else in the queue
            self._effects.insert(1, partial(self._announce, step))
            self._effects.insert(2, self._prune)

    def _announce(self, step: int) -> None:
        state = self._store.state(step)
        resumable = self._store.resumable(step)
        data = {"step": step, "path": self._path(step), "digest": state.digest, "metrics": state.metrics,
                "resumable": resumable}  # fmt: skip
        self.emit("checkpoint", "info", f"Checkpoint created at step {step}", data)
        self._announced.add(step)

    def _prune(self) -> None:
        published = [step for step in self._store.steps() if self._was_published(step)]
        for step in self._store.prune(self._keep, frozenset(published[-PUBLISHED_KEPT:])):
            # behind this effect, before the rest: a full disk must not swallow one
            self._effects.insert(1, partial(self._tell_pruned, step))

    def _was_published(self, step: int) -> bool:
        try:
            return self._store.state(step).published
        except CheckpointError:
            return False  # without its state nobody can go on from it or publish it: it may go

    def _tell_pruned(self, step: int) -> None:
        data = {"step": step, "path": self._path(step)}
        self.emit("pruned", "info", f"Checkpoint of step {step} removed", data)
        self._announced.discard(step)

    def _publish(self, step: int) -> None:
        data = {"step": step, "path": self._path(step), "digest": self._store.state(step).digest}
        self.emit("published", "info", f"Adapter of step {step} published", data)

    def _write_results(self) -> None:
        replace_file(self._data_dir / self._result_path(), result_table(self._log.records()).encode())

    def _finish(self, step: int, trained_tokens: int) -> None:
        data = {"step": step, "path": self._path(step), "digest": self._store.state(step).digest,
                "trained_tokens": trained_tokens, "result_file": self._result_path()}  # fmt: skip
        self.emit("finished", "info", "The job has successfully completed", data)

    def _path(self, step: int) -> str:
        return self._store.path(step).relative_to(self._data_dir).as_posix()

    def _result_path(self) -> str:
        return f"jobs/{self._job_id}/result.csv"
