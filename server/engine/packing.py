"""How training rows become sweeps, and how a sweep is shown to the scheduler."""

from __future__ import annotations

from coserve.scheduler.state import SweepJob, SweepState
from coserve.server.engine.head import head_steps
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep, TrainSequence


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


def stored_row_bytes(model: BaseModel) -> tuple[int, int]:
    """Bytes stored a training row under "recompute" and under "save": layer inputs, keys and values; for "save" also
    every frozen product, attention's output and log-sum-exp."""
    config = model.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or model.hidden_size // heads)
    recompute = model.layer_count * (model.hidden_size + 2 * kv_heads * head_dim)
    products = sum(site.out_features for site in model.sites)
    save = recompute + products + model.layer_count * heads * (head_dim + 1)
    return recompute * model.dtype.itemsize, save * model.dtype.itemsize


def lean_window(window: int) -> int:
    """Rows of a unit where memory ran out under `window`."""
    return min(window, max(16, window // 4))


def sweep_state(
    sweep_id: int, sweep: Sweep, model: BaseModel, window: int, jobs: tuple[SweepJob, ...] = ()
) -> SweepState:
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
    )
