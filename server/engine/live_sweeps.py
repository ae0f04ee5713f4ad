"""The sweeps under way: which jobs share one, and the blocks in which each keeps its activations.

How a job's rows are cut into sweeps is a function of the rows and of the activations' budget; when a sweep gets its
blocks, gives some of them back or leaves the device is the scheduler's to say. Nothing here runs a model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from coserve.scheduler.state import Plan, SweepJob, SweepState
from coserve.server.engine.activation_store import ActivationStore, StoreLayout
from coserve.server.engine.containment import attempt
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.model import BaseModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.packing import lean_window, sweep_state
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.runner import YIELDED
from coserve.server.engine.running_job import RunningJob
from coserve.server.engine.sweep import Sweep
from coserve.server.training.fault import Fault


class LiveSweeps:
    """`by_id` is what the runner works on; a sweep that is done, or lost, is taken out by the trainer (`remove`)."""

    def __init__(
        self, model: BaseModel, options: EngineOptions, blocks: BlockManager, cache: KVCache, most_blocks: int
    ) -> None:
        """`most_blocks`: that all sweeps hold together."""
        self._model, self._options, self._manager, self._cache = model, options, blocks, cache
        self._layout = StoreLayout(model, cache.layers, cache.block_size)
        self.most_blocks = most_blocks
        self.longest_row = self._layout.rows(most_blocks, save=False)
        self._rows_save = self._layout.rows(most_blocks, save=True)
        self.most_rows = self._rows_save if options.activations == "save" else self.longest_row  # of one sweep
        self.by_id: dict[int, Sweep] = {}
        self._blocks: dict[int, list[int]] = {}  # of the placed ones
        self._unplaced: dict[int, float] = {}  # the others, and since when
        self._offers: dict[int, tuple[str | None, str | None]] = {}  # those that are new -> tenant, priority
        self._next_id = 0

    # ------------------------------------------------------------------ sharing

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

    def start(self, group: Sequence[RunningJob]) -> None:
        """A sweep of the next part of each job's step, which waits to be placed; nothing has changed if that raises."""
        sequences = [sequence for running in group for sequence in running.waiting[0]]
        backward = all(running.batch is None or running.batch.kind == "train" for running in group)
        sweep_id = self._next_id
        self.by_id[sweep_id] = Sweep(
            sequences, layers=self._model.layer_count, dtype=self._model.dtype, device=self._model.device,
            save=backward and self._saves(group), lean=group[0].lean, backward=backward,
        )  # fmt: skip
        self._next_id += 1
        self._unplaced[sweep_id] = time.monotonic()
        self._offers[sweep_id] = group[0].tenant, group[0].priority
        for running in group:
            del running.waiting[0]
            running.sweeps += 1

    def _saves(self, group: Sequence[RunningJob]) -> bool:
        """Whether frozen products are kept, too: where they fit, unless they are never to be."""
        wanted = self._options.activations != "recompute" and not group[0].lean
        return wanted and sum(map(_rows, group)) <= self._rows_save

    # ------------------------------------------------------------------ memory

    def rearrange(self, plan: Plan) -> dict[int, Fault]:
        """Carry out what a plan says of the sweeps' memory; returns those for which it failed, and why."""
        moves = [(self.park, sweep_id) for sweep_id in plan.park]
        moves += [(self.lean, sweep_id) for sweep_id in plan.lean]
        moves += [(self.place, sweep_id) for sweep_id in plan.place]
        failed: dict[int, Fault] = {}
        for move, sweep_id in moves:
            if sweep_id in self.by_id:
                fault = attempt(f"to {move.__name__} sweep {sweep_id}", partial(move, sweep_id))
                if fault is not None:  # of parking: no room on the host, and generation needs the blocks all the same
                    failed[sweep_id] = YIELDED if sweep_id in plan.park else fault
        return failed

    def place(self, sweep_id: int) -> None:
        """Give a sweep its blocks; what was parked comes back. Raises OutOfBlocks, and then nothing has changed."""
        sweep = self.by_id[sweep_id]
        blocks = self._manager.take(self._layout.blocks(sweep.rows, sweep.save))
        self._blocks[sweep_id] = blocks
        del self._unplaced[sweep_id]
        self._offers.pop(sweep_id, None)
        sweep.place(ActivationStore(self._layout, self._cache, blocks, sweep.rows, sweep.save))

    def lean(self, sweep_id: int) -> None:
        """Keep no more than "recompute" does, and give the rest back."""
        self._give(sweep_id, self.by_id[sweep_id].forget_products())

    def park(self, sweep_id: int) -> None:
        """Give all blocks back; what they hold goes to the host. Raises OSError where there is no room for that."""
        folder = self._options.data_dir / "tmp"
        folder.mkdir(exist_ok=True)
        self._give(sweep_id, self.by_id[sweep_id].park(folder))
        del self._blocks[sweep_id]
        self._unplaced[sweep_id] = time.monotonic()

    def drop(self, sweep_id: int, job_id: str) -> None:
        """Take a job out of a sweep; the others lose nothing."""
        self._give(sweep_id, self.by_id[sweep_id].drop(job_id))

    def remove(self, sweep_id: int) -> Sweep | None:
        """A sweep is over, whatever it still had to do; its blocks are free."""
        self._unplaced.pop(sweep_id, None)
        self._offers.pop(sweep_id, None)
        self._manager.give(self._blocks.pop(sweep_id, ()))
        return self.by_id.pop(sweep_id, None)

    def _give(self, sweep_id: int, blocks: Sequence[int]) -> None:
        if blocks:
            given = set(blocks)
            self._blocks[sweep_id] = [block for block in self._blocks[sweep_id] if block not in given]
            self._manager.give(blocks)

    @property
    def blocks(self) -> int:
        """Held by all sweeps."""
        return sum(map(len, self._blocks.values()))

    @property
    def ending_blocks(self) -> int:
        """Held by sweeps that are done and still to be taken out."""
        return sum(len(blocks) for sweep_id, blocks in self._blocks.items() if self.by_id[sweep_id].done)

    # ------------------------------------------------------------------ for the scheduler

    def state(self, sweep_id: int, jobs: tuple[SweepJob, ...]) -> SweepState:
        sweep, window = self.by_id[sweep_id], self._options.window()
        return sweep_state(
            sweep_id, sweep, self._model, lean_window(window) if sweep.lean else window, jobs,
            blocks=self._layout.blocks(sweep.rows, sweep.save), lean_blocks=self._layout.blocks(sweep.rows, save=False),
            unplaced_since=self._unplaced.get(sweep_id),
        )  # fmt: skip

    def offered(self, running: RunningJob) -> bool:
        """Whether a new sweep of its tenant and priority waits for its blocks: a job that is due waits for the next
        one, which those may share that become due meanwhile."""
        return (running.tenant, running.priority) in self._offers.values()


def _rows(running: RunningJob) -> int:
    """Of the next part of its step."""
    return sum(len(sequence.input_ids) for sequence in running.waiting[0])
