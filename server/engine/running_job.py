"""A job in the engine's hands, between its files and the sweeps: plain state that only the trainer changes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.job_step import JobStep, TrainSequence
from coserve.server.engine.packing import split_batch
from coserve.server.engine.pooled_adapter import PooledAdapter
from coserve.server.training.batches import Batch
from coserve.server.training.job import TrainingJob
from coserve.server.training.peft.lora import LoraPair

_LEAN_PARTS = 4  # of a step whose memory ran out


def finish_step(job: TrainingJob, batch: Batch, step: JobStep) -> None:
    """All rows of the batch are through. Waits for the device; to be run aside."""
    if batch.kind == "train":
        grads = {name: LoraPair(a, b) for name, (a, b) in step.grads.items()}
        job.finish_train(batch, grads, step.loss_sum, step.correct)
    else:
        job.finish_eval(batch, step.loss_sum, step.correct)


@dataclass(slots=True)
class RunningJob:
    job_id: str
    side: Future[Any] | None = None  # side work under way
    then: Callable[[Any], None] | None = None  # what follows it, in the loop
    job: TrainingJob | None = None
    batch: Batch | None = None
    step: JobStep | None = None
    reported: Batch | None = None  # the newest that is through: its report may still be under way at the side
    waiting: list[list[TrainSequence]] = field(default_factory=list)  # parts of the batch that are in no sweep yet
    sweeps: int = 0  # live sweeps with rows of this job
    stop: str | None = None  # "pause" | "cancel", asked for
    again: bool = False  # started anew while it was stopping
    waits: str | None = None  # for what, while its training copy has no place in the pool
    lean: bool = False  # memory ran out: from here on in sweeps of its own, with the least activations
    faults: int = 0  # of the step under way

    @property
    def key(self) -> str:
        """Of its training copy in the pool."""
        return f"job:{self.job_id}"

    @property
    def tenant(self) -> str | None:
        """Whose job it is; None before it has been opened."""
        return None if self.job is None else self.job.tenant

    @property
    def priority(self) -> str | None:
        """None before it has been opened."""
        return None if self.job is None else self.job.priority

    @property
    def due(self) -> bool:
        """Whether its next rows may go into a sweep; a lean job has one at a time."""
        return bool(self.waiting) and self.stop is None and not (self.lean and self.sweeps)

    def begin(self, pool: AdapterPool, batch: Batch, most_rows: int) -> None:
        """Lay out a step, from its first row, in parts of at most `most_rows` rows (lean: a quarter of the step)."""
        if self.job is None:
            raise RuntimeError(f"job {self.job_id} is not open")
        adapter = self.job.spec.adapter
        step = JobStep(
            self.job_id, PooledAdapter(pool, self.key), batch.loss_tokens, dropout=adapter.dropout,
            dropout_key=(self.job.spec.seed, batch.step),
        )  # fmt: skip
        sequences = [TrainSequence(step, row.input_ids, row.labels, row.sequence) for row in batch.rows]
        self.batch, self.step = batch, step
        self.waiting = split_batch(sequences, min(most_rows, batch.tokens // _LEAN_PARTS) if self.lean else most_rows)

    def drop_step(self) -> None:
        """Forget the step under way; the batch stays the job's next one."""
        self.sweeps, self.batch, self.step, self.waiting = 0, None, None, []
