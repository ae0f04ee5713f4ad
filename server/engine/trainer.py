"""The jobs in the engine's hands: from a job's next batch to a sweep, and from a finished sweep to its next step.

Slow work of a job that is not a token's (opening, the optimizer step, checkpoints with their fsync) runs on one
side thread, in order, so that no other tenant's tokens wait for it. Sweeps, pool pages and messages belong to the
engine's loop: `tick` moves finished side work back into it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from coserve.scheduler.state import SweepJob, SweepState
from coserve.server.engine.adapter_pool import AdapterPool, PoolFull
from coserve.server.engine.model import BaseModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.packing import split_batch, stored_row_bytes, sweep_state
from coserve.server.engine.sweep import JobStep, Sweep, TrainSequence
from coserve.server.training.batches import Batch
from coserve.server.training.job import JobError, JobOver, TrainingJob
from coserve.server.training.peft.lora import LoraPair
from coserve.server.training.peft.sites import Site
from coserve.server.wire.messages import JobEvent

log = logging.getLogger("coserve.engine")


class _TrainingCopy:
    """A job's adapter in the pool, as it is while the step's tokens run."""

    def __init__(self, pool: AdapterPool, key: str) -> None:
        self._pool, self._key = pool, key

    def pair(self, site: Site) -> tuple[Tensor, Tensor, float] | None:
        return self._pool.tensors(self._key, site.name)


@dataclass(slots=True)
class _RunningJob:
    job_id: str
    side: Future[Any] | None = None  # side work under way
    then: Callable[[Any], None] | None = None  # what follows it, in the loop
    job: TrainingJob | None = None
    batch: Batch | None = None
    step: JobStep | None = None
    waiting: list[list[TrainSequence]] = field(default_factory=list)  # parts of the batch that are in no sweep yet
    sweeps: int = 0  # live sweeps with rows of this job
    stop: str | None = None  # "pause" | "cancel", asked for
    again: bool = False  # started anew while it was stopping

    @property
    def key(self) -> str:
        return f"job:{self.job_id}"


class Trainer:
    """All jobs and sweeps of one engine."""

    def __init__(
        self, model: BaseModel, pool: AdapterPool, options: EngineOptions, base_digest: str, base_name: str
    ) -> None:
        self._model, self._pool, self._options = model, pool, options
        self._base_digest, self._base_name = base_digest, base_name
        self._jobs: dict[str, _RunningJob] = {}
        self._events: SimpleQueue[JobEvent] = SimpleQueue()
        self._side = ThreadPoolExecutor(1, thread_name_prefix="coserve-training")
        self.sweeps: dict[int, Sweep] = {}
        self._next_sweep = 0
        recompute, save = stored_row_bytes(model)
        self._rows_save = max(1, options.activation_bytes() // save)
        self._rows_recompute = max(1, options.activation_bytes() // recompute)

    # ------------------------------------------------------------------ commands

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether side work is under way, so that `tick` will have something to do soon."""
        return any(job.side is not None for job in self._jobs.values())

    def start(self, job_id: str) -> None:
        """Run a job, or go on with it. Idempotent."""
        running = self._jobs.get(job_id)
        if running is not None:
            running.again = running.stop == "pause"
            return
        self._jobs[job_id] = running = _RunningJob(job_id)
        self._aside(running, lambda: self._open(job_id), lambda job: self._opened(running, job))

    def stop(self, job_id: str, *, pause: bool) -> None:
        """Stop a job at the next unit. Idempotent; an unknown job is one that has already stopped."""
        running = self._jobs.get(job_id)
        if running is None:
            return
        running.stop = "pause" if pause and running.stop != "cancel" else "cancel"
        running.again = False
        self._leave_sweeps(running)

    def close(self) -> None:
        """Checkpoint every job and end the side thread; called once, when the engine drains."""
        for running in list(self._jobs.values()):
            if running.job is not None and running.stop is None:
                self._side.submit(running.job.checkpoint_now)
        self._side.shutdown(wait=True)

    def events(self) -> Iterable[JobEvent]:
        """Events appended since the last call."""
        while not self._events.empty():
            yield self._events.get()

    # ------------------------------------------------------------------ the loop's part

    def tick(self) -> None:
        """Take back finished side work, retire finished sweeps, start the steps that are due."""
        for running in list(self._jobs.values()):
            if running.side is not None and running.side.done():
                self._take_back(running, running.side)
        for sweep_id, sweep in list(self.sweeps.items()):
            if sweep.done:
                del self.sweeps[sweep_id]
                self._sweep_done(sweep)
        for running in list(self._jobs.values()):
            self._advance(running)
        self._new_sweeps()

    def _take_back(self, running: _RunningJob, side: Future[Any]) -> None:
        """Go on after side work. An error nobody foresaw ends that job, never the engine."""
        then, error = running.then, side.exception()
        running.side = running.then = None
        if error is None:
            if then is not None:
                then(side.result())
            return
        log.error("job %s: unexpected error", running.job_id, exc_info=error)
        job = running.job
        self._leave_sweeps(running)
        if job is None or job.state == "failed":
            self._forget(running)
        else:
            self._aside(running, lambda: job.fail("internal_error", f"An internal error ended the job: {error}"), None)

    def states(self) -> tuple[SweepState, ...]:
        return tuple(self._state(sweep_id, sweep) for sweep_id, sweep in self.sweeps.items())

    def _advance(self, running: _RunningJob) -> None:
        job = running.job
        if job is None or running.side is not None or running.sweeps:
            return
        if running.stop is not None:
            self._aside(running, job.pause if running.stop == "pause" else job.cancel, lambda _: self._forget(running))
        elif job.state != "running":
            # Over, or out of disk space: the gateway starts it again, from its newest checkpoint.
            self._forget(running)
        elif running.batch is None:
            self._aside(running, job.next_batch, lambda batch: self._next(running, batch))

    def _next(self, running: _RunningJob, batch: Batch | None) -> None:
        if batch is None or running.job is None or running.stop is not None:
            return
        adapter = running.job.spec.adapter
        step = JobStep(
            running.job_id, _TrainingCopy(self._pool, running.key), batch.loss_tokens,
            dropout=adapter.dropout, dropout_key=(running.job.spec.seed, batch.step),
        )  # fmt: skip
        sequences = [TrainSequence(step, row.input_ids, row.labels, row.sequence) for row in batch.rows]
        running.batch, running.step = batch, step
        running.waiting = split_batch(sequences, self._rows_recompute)

    def _new_sweeps(self) -> None:
        """One new sweep of everything that is due, unless a sweep is still on its way forward."""
        due = [running for running in self._jobs.values() if running.waiting and running.stop is None]
        while due:
            sequences: list[TrainSequence] = []
            kinds: set[str] = set()
            for running in list(due):
                batch, rows = running.batch, sum(len(s.input_ids) for s in sequences)
                more = sum(len(s.input_ids) for s in running.waiting[0])
                if batch is None or (sequences and (rows + more > self._rows_recompute or batch.kind not in kinds)):
                    continue
                kinds.add(batch.kind)
                sequences += running.waiting.pop(0)
                running.sweeps += 1
                due.remove(running)
            rows = sum(len(s.input_ids) for s in sequences)
            policy = self._options.activations
            save = policy == "save" or (policy == "auto" and rows <= self._rows_save)
            self.sweeps[self._next_sweep] = Sweep(
                sequences, layers=self._model.layer_count, dtype=self._model.dtype, device=self._model.device,
                save=save, backward=kinds == {"train"},
            )  # fmt: skip
            self._next_sweep += 1

    def _sweep_done(self, sweep: Sweep) -> None:
        for step in sweep.steps:
            running = self._jobs.get(step.job_id)
            if running is None or running.step is not step:
                continue
            running.sweeps -= 1
            if running.sweeps or running.waiting or running.job is None or running.batch is None:
                continue
            batch, job = running.batch, running.job
            running.batch = running.step = None
            if running.stop is not None:
                continue
            if batch.kind == "train":
                grads = {name: LoraPair(a, b) for name, (a, b) in step.grads.items()}
                self._aside(
                    running,
                    lambda job=job, batch=batch, grads=grads, step=step: job.finish_train(  # type: ignore[misc]
                        batch, grads, step.loss_sum, step.correct
                    ),
                    lambda _, running=running: self._refresh(running),  # type: ignore[misc]
                )
            else:
                self._aside(
                    running,
                    lambda job=job, batch=batch, step=step: job.finish_eval(batch, step.loss_sum, step.correct),  # type: ignore[misc]
                    None,
                )

    def _refresh(self, running: _RunningJob) -> None:
        """The training copy is rounded again from the master weights after each step."""
        if running.job is not None and running.key in self._pool:
            for name, pair in running.job.params.items():
                self._pool.overwrite(running.key, name, pair.a, pair.b)

    # ------------------------------------------------------------------ opening and leaving

    def _open(self, job_id: str) -> TrainingJob | None:
        """On the side thread. A job that cannot run has said so in its events."""
        try:
            return TrainingJob.open(
                self._options.data_dir, job_id, self._model.sites, self._base_digest, self._model.device,
                self._model.dtype, on_event=self._on_event, base_model_name=self._base_name,
                vocab_size=self._model.vocab_size,
            )  # fmt: skip
        except (JobError, JobOver) as error:
            log.warning("job %s does not run: %s", job_id, error)
            return None

    def _opened(self, running: _RunningJob, job: TrainingJob | None) -> None:
        if job is None:
            self._jobs.pop(running.job_id, None)
            return
        running.job = job
        if running.stop is not None:
            return
        wanted = self._pool.pages_wanted(job.params)
        if wanted > self._pool.num_pages:
            size, have = wanted * self._pool.page_bytes, self._pool.num_pages * self._pool.page_bytes
            message = (
                f"The adapter needs {size} bytes of adapter memory and the server has {have}; use a smaller rank or "
                "fewer target modules, or start the server with a larger --adapter-memory."
            )
            self._aside(running, lambda: job.fail("adapter_too_large", message), None)
            return
        try:
            self._pool.load(running.key, job.params, pinned=True, fold_scaling=False)
        except PoolFull:
            # Adapters in use hold the pool: try again when the loop comes round.
            self._aside(running, lambda: None, lambda _: self._opened(running, job))
            running.job = None

    def _leave_sweeps(self, running: _RunningJob) -> None:
        for sweep_id, sweep in list(self.sweeps.items()):
            if any(step.job_id == running.job_id for step in sweep.steps):
                sweep.drop(running.job_id)
                if not sweep.sequences:
                    del self.sweeps[sweep_id]
        running.sweeps, running.batch, running.step, running.waiting = 0, None, None, []

    def _forget(self, running: _RunningJob) -> None:
        if running.key in self._pool:
            self._pool.unpin(running.key)
            self._pool.unload(running.key)
        if running.job is not None:
            running.job.close()
        self._jobs.pop(running.job_id, None)
        if running.again:
            self.start(running.job_id)

    def _aside(self, running: _RunningJob, work: Callable[[], Any], then: Callable[[Any], None] | None) -> None:
        running.side, running.then = self._side.submit(work), then

    def _on_event(self, job_id: str, seq: int, record: dict[str, Any]) -> None:
        self._events.put(JobEvent(job_id, seq, record))

    def _state(self, sweep_id: int, sweep: Sweep) -> SweepState:
        jobs = [self._jobs[step.job_id].job for step in sweep.steps if step.job_id in self._jobs]
        known = tuple(SweepJob(job.job_id, job.tenant, job.weight, job.priority) for job in jobs if job is not None)
        return sweep_state(sweep_id, sweep, self._model, self._options.window(), known)
