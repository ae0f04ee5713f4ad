"""The sweeps under way: which jobs share one, what it keeps, and when there is memory for the next.

How a job's rows are cut into sweeps is a function of the rows and of the activations' budget; when a sweep begins
depends on what else is live. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from coserve.scheduler.state import SweepJob, SweepState
from coserve.server.engine.model import BaseModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.packing import lean_window, stored_row_bytes, sweep_state
from coserve.server.engine.running_job import RunningJob
from coserve.server.engine.sweep import Sweep


class LiveSweeps:
    """`by_id` is what the runner works on; a sweep that is done, or lost, is taken out by the trainer."""

    def __init__(self, model: BaseModel, options: EngineOptions) -> None:
        self._model, self._options = model, options
        self._row_bytes = recompute, save = stored_row_bytes(model)
        self._most_bytes = options.activation_bytes()
        self._rows_save = max(1, self._most_bytes // save)
        self.most_rows = max(1, self._most_bytes // recompute)  # of one sweep
        self.by_id: dict[int, Sweep] = {}
        self._next_id = 0

    def group(self, due: Sequence[RunningJob]) -> list[RunningJob]:
        """The first of the jobs that are due, and those whose rows may share its sweep: jobs of one tenant and of one
        priority, so that both take turns between sweeps. Windows of several sweeps ride in one packed forward all the
        same."""
        first, *others = due
        if first.lean or first.batch is None:
            return [first]
        group, rows = [first], _rows(first)
        for running in others:
            alike = running.batch is not None and running.batch.kind == first.batch.kind and not running.lean
            alike = alike and (running.tenant, running.priority) == (first.tenant, first.priority)
            if alike and rows + _rows(running) <= self.most_rows:
                group.append(running)
                rows += _rows(running)
        return group

    def fits(self, group: Sequence[RunningJob]) -> bool:
        """Whether a sweep of these jobs' rows may store what it has to beside what is live. Alone, any may."""
        stored = sum(sweep.rows * self._row_bytes[sweep.save] for sweep in self.by_id.values())
        rows = sum(map(_rows, group))
        return not self.by_id or stored + rows * self._row_bytes[self._saves(group)] <= self._most_bytes

    def start(self, group: Sequence[RunningJob]) -> None:
        """A sweep of the next part of each job's step; nothing has changed if that raises."""
        sequences = [sequence for running in group for sequence in running.waiting[0]]
        self.by_id[self._next_id] = Sweep(
            sequences, layers=self._model.layer_count, dtype=self._model.dtype, device=self._model.device,
            save=self._saves(group), lean=group[0].lean,
            backward=all(running.batch is None or running.batch.kind == "train" for running in group),
        )  # fmt: skip
        self._next_id += 1
        for running in group:
            del running.waiting[0]
            running.sweeps += 1

    def state(self, sweep_id: int, jobs: tuple[SweepJob, ...]) -> SweepState:
        """What the scheduler is told."""
        sweep, window = self.by_id[sweep_id], self._options.window()
        return sweep_state(sweep_id, sweep, self._model, lean_window(window) if sweep.lean else window, jobs)

    def _saves(self, group: Sequence[RunningJob]) -> bool:
        """Whether frozen products are kept, too."""
        policy = self._options.activations
        if group[0].lean:
            return False
        return policy == "save" or (policy == "auto" and sum(map(_rows, group)) <= self._rows_save)


def _rows(running: RunningJob) -> int:
    """Of the next part of its step."""
    return sum(len(sequence.input_ids) for sequence in running.waiting[0])
