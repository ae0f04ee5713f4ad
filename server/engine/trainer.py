"""The jobs in the engine's hands: from a job's next batch to a sweep, and from a finished sweep to its next step.

Slow work of a job that is not a token's (opening, the optimizer step, checkpoints with their fsync) runs on one
side thread, in order, so that no other tenant's tokens wait for it. Sweeps, pool pages and messages belong to the
engine's loop: `tick` moves finished side work back into it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

from coserve.scheduler.forecast import JobWork
from coserve.scheduler.state import Plan, SweepJob, SweepState
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.containment import attempt
from coserve.server.engine.copies import TrainingCopies
from coserve.server.engine.cores import work_behind
from coserve.server.engine.job_forecasts import works
from coserve.server.engine.live_sweeps import LiveSweeps
from coserve.server.engine.model import BaseModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.runner import YIELDED
from coserve.server.engine.running_job import RunningJob, finish_step
from coserve.server.engine.shares import Shares
from coserve.server.engine.sweep import Sweep
from coserve.server.training.batches import Batch
from coserve.server.training.fault import OUT_OF_MEMORY, Fault, row_too_long, told
from coserve.server.training.job import JobError, JobOver, TrainingJob
from coserve.server.wire.messages import JobEvent

log = logging.getLogger("coserve.engine")

_FAULTS_ALLOWED = 1  # in one step: it is run once more, with the least memory
_FIRST_REST, _LONGEST_REST = 1.0, 30.0  # seconds without training, after it gave its memory to generation


class Trainer:
    """All jobs and sweeps of one engine."""

    def __init__(
        self, model: BaseModel, pool: AdapterPool, live: LiveSweeps, options: EngineOptions, base_digest: str,
        base_name: str, shares: Shares, served: Callable[[str], float],
    ) -> None:  # fmt: skip
        """`served`: how much of the device a tenant has had; sweeps of the one with least begin first."""
        self._shares, self._served = shares, served
        self._model, self._pool, self._options = model, pool, options
        self._base_digest, self._base_name = base_digest, base_name
        self._jobs: dict[str, RunningJob] = {}
        self._events: SimpleQueue[JobEvent] = SimpleQueue()
        self._side = ThreadPoolExecutor(1, thread_name_prefix="coserve-training", initializer=work_behind)
        self.live = live  # to be read, not changed
        self._copies = TrainingCopies(pool, shares)
        self._rest, self._rest_until = _FIRST_REST, 0.0

    # ------------------------------------------------------------------ commands

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._jobs)

    @property
    def jobs(self) -> Iterable[RunningJob]:
        """To be read, not changed."""
        return self._jobs.values()

    @property
    def sweeps(self) -> Mapping[int, Sweep]:
        """What the runner works on."""
        return self.live.by_id

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
        self._jobs[job_id] = running = RunningJob(job_id)
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
                self._guarded(running, partial(self._take_back, running, running.side))
        for sweep_id, sweep in list(self.live.by_id.items()):
            if sweep.done:
                self.live.remove(sweep_id)
                self._rest = _FIRST_REST
                self._sweep_done(sweep)
        self._copies.turn()
        for running in list(self._jobs.values()):
            self._guarded(running, partial(self._advance, running))
        if time.monotonic() >= self._rest_until:
            self._new_sweeps()

    def _guarded(self, running: RunningJob, work: Callable[[], None]) -> None:
        """An error nobody foresaw ends the job that it is about, never the engine."""
        fault = attempt(f"job {running.job_id}", work)
        if fault is not None:
            self._fail(running, fault)

    def _take_back(self, running: RunningJob, side: Future[Any]) -> None:
        """Go on after side work. Raises what it raised."""
        then, running.side, running.then = running.then, None, None
        result = side.result()
        if then is not None:
            then(result)

    def states(self) -> tuple[SweepState, ...]:
        """Of the sweeps that have work left."""
        return tuple(self._state(sweep_id, sweep) for sweep_id, sweep in self.live.by_id.items() if not sweep.done)

    @property
    def waits(self) -> dict[str, str]:
        """Jobs that have no place in the adapter pool yet, and why."""
        return {job.job_id: job.waits for job in self._jobs.values() if job.waits is not None}

    @property
    def lacks(self) -> int:
        """Blocks that a job's training copy waits for."""
        return self._copies.lacks

    def works(self) -> tuple[JobWork, ...]:
        """What the jobs that train still have to run beyond the sweeps under way."""
        return works(self._jobs.values(), self._shares.weight, self._options.window(), self._model.layer_count)

    def _advance(self, running: RunningJob) -> None:
        job = running.job
        if job is None or running.side is not None or running.sweeps:
            return
        if running.stop is not None:
            self._aside(running, job.pause if running.stop == "pause" else job.cancel, lambda _: self._forget(running))
        elif job.state != "running":
            # Over, or out of disk space: the gateway starts it again, from its newest checkpoint.
            self._forget(running)
        elif running.key not in self._pool:
            self._place(running, job)
        elif running.batch is None:
            self._aside(running, job.next_batch, lambda batch: self._next(running, batch))

    def _next(self, running: RunningJob, batch: Batch | None) -> None:
        if batch is None or running.stop is not None:
            return
        longest = max(len(row.input_ids) for row in batch.rows)
        if longest <= self.live.longest_row:
            running.begin(self._pool, batch, self.live.most_rows)
        elif running.job is not None:
            self._aside(running, partial(running.job.fail, *row_too_long(longest, self.live.longest_row)), None)

    def _new_sweeps(self) -> None:
        """Sweeps of everything that is due; the scheduler gives them memory. One of a tenant and a priority waits for
        that at a time."""
        due = [running for running in self._jobs.values() if running.due]
        due.sort(key=lambda running: self._served(running.tenant or ""))
        while due := [running for running in due if not self.live.offered(running)]:
            group = self.live.group(due)
            fault = attempt("a new sweep", partial(self.live.start, group))
            if fault is not None:
                for running in group:
                    self._again(running, fault)
                return

    def rearrange(self, plan: Plan) -> None:
        """Carry out what a plan says of the sweeps' memory."""
        self.lose(self.live.rearrange(plan))

    def _sweep_done(self, sweep: Sweep) -> None:
        for step in sweep.steps:
            running = self._jobs.get(step.job_id)
            if running is None or running.step is not step:
                continue
            running.sweeps -= 1
            if running.sweeps or running.waiting or running.job is None or running.batch is None:
                continue
            finish, trains = partial(finish_step, running.job, running.batch, step), running.batch.kind == "train"
            running.reported, running.batch, running.step = running.batch, None, None
            running.faults = 0
            if running.stop is None:
                self._aside(running, finish, partial(self._refresh, running) if trains else None)

    def _refresh(self, running: RunningJob, _: None) -> None:
        """The optimizer has stepped."""
        self._copies.refresh(running)

    # ------------------------------------------------------------------ faults

    def lose(self, lost: Mapping[int, Fault]) -> None:
        """These sweeps have given up what they held: the steps of their jobs begin anew, in less memory."""
        if YIELDED in lost.values():
            self._rest_until, self._rest = time.monotonic() + self._rest, min(2 * self._rest, _LONGEST_REST)
        for sweep_id, fault in lost.items():
            sweep = self.live.remove(sweep_id)
            for step in sweep.steps if sweep is not None else ():
                running = self._jobs.get(step.job_id)
                if running is not None and running.step is step:
                    self._again(running, fault)

    def _again(self, running: RunningJob, fault: Fault) -> None:
        """Run a job's step once more: by itself, in small parts and windows, keeping the least. Twice is enough."""
        batch, job, known = running.batch, running.job, running.lean
        self._leave_sweeps(running)
        if batch is None or job is None or running.stop is not None:
            return
        running.lean = True
        running.faults += fault is not YIELDED
        if running.faults > _FAULTS_ALLOWED:
            self._fail(running, fault)
        elif known:
            running.begin(self._pool, batch, self.live.most_rows)
        else:
            why = "memory ran out" if fault.code in (OUT_OF_MEMORY, YIELDED.code) else "an internal error"
            text = f"Step {batch.step} is run again, and this and later steps in smaller parts: {why}"
            running.batch = batch
            self._aside(running, partial(job.warn, text), lambda _: self._next(running, batch))

    def _fail(self, running: RunningJob, fault: Fault) -> None:
        job, step = running.job, running.batch.step if running.batch is not None else None
        self._leave_sweeps(running)
        if job is None or job.state not in ("running", "paused"):
            self._forget(running)
            return
        message = told(fault, step, in_parts=running.faults > _FAULTS_ALLOWED)
        self._aside(running, partial(job.fail, fault.code, message), None)

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

    def _opened(self, running: RunningJob, job: TrainingJob | None) -> None:
        if job is None:
            self._jobs.pop(running.job_id, None)
        running.job = job

    def _place(self, running: RunningJob, job: TrainingJob) -> None:
        """Put a job's training copy into the pool, as soon as there is room."""
        never = self._copies.place(running, job)
        if never is not None:
            self._aside(running, partial(job.fail, "adapter_too_large", never), None)

    def _leave_sweeps(self, running: RunningJob) -> None:
        running.drop_step()
        for sweep_id, sweep in list(self.live.by_id.items()):
            if sweep_id not in self.live.by_id or all(step.job_id != running.job_id for step in sweep.steps):
                continue
            others = [step for step in sweep.steps if step.job_id != running.job_id]
            leave = partial(self.live.drop, sweep_id, running.job_id)
            fault = attempt("taking a job out of a sweep", leave) if others else None
            if others and fault is None:
                continue
            self.live.remove(sweep_id)
            for step in others:  # its rows are part old, part new: nobody can go on with it
                other = self._jobs.get(step.job_id)
                if other is not None and other.step is step and fault is not None:
                    self._again(other, fault)

    def _forget(self, running: RunningJob) -> None:
        self._jobs.pop(running.job_id, None)
        self._copies.remove(running)
        if running.again:
            self.start(running.job_id)
        if running.job is not None:
            running.job.close()

    def _aside(self, running: RunningJob, work: Callable[[], Any], then: Callable[[Any], None] | None) -> None:
        running.side, running.then = self._side.submit(work), then

    def _on_event(self, job_id: str, seq: int, record: dict[str, Any]) -> None:
        self._events.put(JobEvent(job_id, seq, record))

    def _state(self, sweep_id: int, sweep: Sweep) -> SweepState:
        jobs = [(one, one.job) for one in (self._jobs.get(step.job_id) for step in sweep.steps) if one is not None]
        known = tuple(
            SweepJob(job.job_id, job.tenant, self._shares.weight(job.tenant), job.priority,
                     adapter_pages=self._copies.pages(running))
            for running, job in jobs if job is not None
        )  # fmt: skip
        return self.live.state(sweep_id, known)
