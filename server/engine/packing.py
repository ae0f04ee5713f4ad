"""How training rows become sweeps, and how a sweep is shown to the scheduler."""

from __future__ import annotations

from coserve.scheduler.state import SweepJob, SweepState
from coserve.server.engine.head import head_steps
from coserve.server.engine.job_step import TrainSequence
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep


def split_batch(sequences: list[TrainSequence], most_rows: int) -> list[list[TrainSequence]]:
    """A batch in as few sweeps as its activations allow; a function of the sequences alone."""
    parts: list[list[TrainSequence]] = []
    rows = 0
    for sequence in sequences:
        if not parts or rows + len(sequence.input_ids) > most_rows:
            parts.append([])
            rows = 0
        parts[-1].append(sequence)
        rows += len(sequence.input_ids)
    return parts


def lean_window(window: int) -> int:
    """Rows of a unit where memory ran out under `window`."""
    return min(window, max(16, window // 4))


def sweep_state(
    sweep_id: int, sweep: Sweep, model: BaseModel, window: int, jobs: tuple[SweepJob, ...] = (), *,
    blocks: int = 0, lean_blocks: int = 0, unplaced_since: float | None = None,
) -> SweepState:  # fmt: skip
    """What the scheduler is told of a sweep whose units take at most `window` rows."""
    batch = sweep.head_batch
    return SweepState(
        sweep_id=sweep_id,
        jobs=jobs,
        layers=sweep.layers,
        stream_tokens=sweep.rows,
        window=window,
        forward_tokens=sweep.forward_rows,
        partial_tokens=sweep.partial_rows,
        partial_layer=sweep.partial_layer,
        head_rows_ready=sweep.head_ready,
        head_rows_left=sweep.head_left,
        head_steps=head_steps(model, sweep.backward),
        head_partial_rows=batch.rows if batch else 0,
        head_partial_steps=batch.steps if batch else 0,
        backward=sweep.backward,
        backward_layer=sweep.layer,
        backward_tokens=sweep.rows - sweep.undone,
        blocks=blocks,
        lean_blocks=lean_blocks,
        placed=unplaced_since is None,
        unplaced_since=unplaced_since,
    )
