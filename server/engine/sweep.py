"""One packed stream of training sequences on its way through forward, head and backward, and what is kept of it.

The sequences of one optimizer step (of several jobs, if they are due together) are laid end to end. The forward
goes through the stream from its first row to its last, in windows of any size; the head takes the rows that
bear a label; the backward goes through every layer from the last row to the first. A window may hold several
sequences, and a sequence may span many windows. What is kept of the layers lies in an `ActivationStore`, which a sweep
has from the moment it is placed until it is over or *parked*: then it lies on the host, and the sweep cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.dropout import RowKeys, dropout_rows
from coserve.kernels.transfer import to_device
from coserve.server.engine.activation_store import ActivationStore
from coserve.server.engine.backend import AdapterRows, Dropout
from coserve.server.engine.job_step import JobStep, TrainSequence
from coserve.server.engine.parked import ParkedRows
from coserve.server.training.peft.sites import Site

if TYPE_CHECKING:
    from coserve.server.engine.head import HeadBatch


@dataclass(frozen=True, slots=True)
class Span:
    """Stream rows [start, end) of one sequence that begins at row `first`."""

    sequence: TrainSequence
    first: int
    start: int
    end: int


class Sweep:
    """The stream, its store and how far it has come. Units are carried out elsewhere; this only keeps the books."""

    def __init__(
        self, sequences: Sequence[TrainSequence], *, layers: int, dtype: torch.dtype, device: torch.device,
        save: bool = False, backward: bool = True, lean: bool = False,
    ) -> None:  # fmt: skip
        self.layers, self.dtype, self.device, self.save, self.backward = layers, dtype, device, save, backward
        self.lean = lean  # its windows are small, because memory ran out before
        self.sequences = sorted(sequences, key=lambda s: s.step.job_id)  # a job's rows are one LoRA segment
        self._lay_out()
        self._store: ActivationStore | None = None
        self._parked: ParkedRows | None = None
        self.final: Tensor | None = None  # [label rows, H] output of the last layer
        self.forward_rows = 0  # rows through all layers
        self.partial_rows = 0  # rows of the window that stopped at a layer boundary …
        self.partial_layer = 0  # … and the layer it goes on from
        self.head_rows = 0  # label rows through the head
        self.head_batch: HeadBatch | None = None  # label rows part-way through it
        self.layer = layers - 1  # backward: current layer, -1 when done
        self.undone = self.rows  # backward: rows [0, undone) of the current layer are still to do
        self.dy: Tensor | None = None  # [N, H] gradient of the current layer's output; becomes that of its input
        self.dk: Tensor | None = None  # [Hkv, N, D] complete for a window when the window is reached
        self.dv: Tensor | None = None

    def _lay_out(self) -> None:
        starts = np.cumsum([0] + [len(s.input_ids) for s in self.sequences])
        self.rows = int(starts[-1])
        self.starts = [int(s) for s in starts[:-1]]
        ids = np.concatenate([s.input_ids for s in self.sequences]) if self.sequences else np.zeros(0, np.int64)
        positions = np.concatenate([np.arange(len(s.input_ids)) for s in self.sequences] or [np.zeros(0, np.int64)])
        # Row t of a sequence predicts label t+1: shifted here, once, over whole sequences and never over windows.
        targets = np.concatenate(
            [np.append(np.asarray(s.labels)[1:], -100) for s in self.sequences] or [np.zeros(0, np.int64)]
        )
        owner = np.repeat(np.arange(len(self.sequences)), [len(s.input_ids) for s in self.sequences])
        labelled = np.flatnonzero(targets != -100)
        self.ids = to_device(torch.from_numpy(ids.astype(np.int64)), self.device)
        self.positions = to_device(torch.from_numpy(positions.astype(np.int64)), self.device)
        self.label_rows = labelled  # ascending stream rows that bear a label
        self.label_targets = targets[labelled].astype(np.int64)
        self.label_owner = owner[labelled]  # index into `sequences`

    # ------------------------------------------------------------------ progress

    @property
    def steps(self) -> list[JobStep]:
        """The job steps with rows in this stream, each once."""
        return list({id(s.step): s.step for s in self.sequences}.values())

    @property
    def forward_done(self) -> bool:
        return self.forward_rows >= self.rows

    @property
    def head_ready(self) -> int:
        """Label rows that are through the forward and not yet through the head."""
        return int(np.searchsorted(self.label_rows, self.forward_rows)) - self.head_rows

    @property
    def head_left(self) -> int:
        return len(self.label_rows) - self.head_rows

    @property
    def done(self) -> bool:
        through_head = self.forward_done and self.head_left == 0
        return through_head and (not self.backward or self.layer < 0)

    # ------------------------------------------------------------------ windows

    def spans(self, start: int, end: int) -> list[Span]:
        """The parts of the sequences that lie in stream rows [start, end)."""
        found = []
        first_index = int(np.searchsorted(self.starts, start, side="right")) - 1
        for first, sequence in zip(self.starts[first_index:], self.sequences[first_index:], strict=True):
            if first >= end:
                break
            found.append(Span(sequence, first, max(start, first), min(end, first + len(sequence.input_ids))))
        return found

    def adapter_rows(self, start: int, end: int, *, row: int = 0, gradients: bool = False) -> list[AdapterRows]:
        """Whose adapters stream rows [start, end) use, one entry a job, where they stand from `row` on in a pass."""
        found = []
        for spans in _by_step(self.spans(start, end)):
            step = spans[0].sequence.step
            drop = _dropout_of(step, spans, self.device) if step.dropout and self.backward else None
            rows = (row + spans[0].start - start, row + spans[-1].end - start)
            found.append(AdapterRows(*rows, step.adapter, drop, step.add_gradient if gradients else None))
        return found

    # ------------------------------------------------------------------ storing

    @property
    def placed(self) -> bool:
        return self._store is not None

    @property
    def store(self) -> ActivationStore:
        """Raises RuntimeError if the sweep has none: it is new, parked or over."""
        if self._store is None:
            raise RuntimeError("the sweep holds no memory")
        return self._store

    def place(self, store: ActivationStore) -> None:
        """Give a sweep that has none a store of its rows; what was parked comes back."""
        if self._parked is not None:
            self._parked.restore(store)
        self._store, self._parked = store, None

    def park(self, folder: Path) -> list[int]:
        """Everything in blocks goes to the host, or into a file in `folder`; returns the blocks, which are free.

        Raises:
            OSError: there is no room for the file; nothing has changed.
        """
        store = self.store
        self._parked = ParkedRows(store, self.layer + 1, self.forward_rows + self.partial_rows, folder, self.device)
        self._store = None
        return store.blocks

    def forget_products(self) -> list[int]:
        """Policy "recompute" from here on; returns the blocks that this leaves."""
        self.save = False
        return self.store.forget_products()

    def keep_final(self, start: int, y: Tensor) -> None:
        """y [T, H], output of the last layer for stream rows from `start` on; only rows with a label are kept."""
        if self.final is None:
            self.final = y.new_empty(len(self.label_rows), y.shape[1])
        first, last = np.searchsorted(self.label_rows, (start, start + y.shape[0]))
        rows = to_device(torch.from_numpy(self.label_rows[first:last] - start), self.device)
        self.final[first:last] = y.index_select(0, rows)

    def finish_layer(self) -> None:
        """The current layer's backward is done: go on to the layer below."""
        self.dk = self.dv = None
        self.layer -= 1
        self.undone = self.rows
        if self.layer < 0:
            self.dy = None

    # ------------------------------------------------------------------ leaving

    @property
    def holds_memory(self) -> bool:
        """Whether anything of weight is kept outside of the blocks."""
        return any(tensor is not None for tensor in self.working_set())

    def working_set(self) -> Iterator[Tensor | None]:
        """What is kept outside of the blocks."""
        yield from (self.final, self.dy, self.dk, self.dv)
        if self._store is not None:
            yield from self._store.tensors()
        if self._parked is not None:
            yield from self._parked.lse.values()
        if self.head_batch is not None:
            yield from self.head_batch.tensors()

    def release(self) -> None:
        """Give up everything that is kept: the sweep is over, whatever it still had to do."""
        self._store = self._parked = None
        self.final = self.dy = self.dk = self.dv = self.head_batch = None

    def drop(self, job_id: str) -> list[int]:
        """Take a job's sequences out at a unit's border; the others' rows move together and lose nothing. Returns the
        blocks that this leaves."""
        keep = [i for i, s in enumerate(self.sequences) if s.step.job_id != job_id]
        live = np.zeros(self.rows, dtype=bool)
        for i in keep:
            live[self.starts[i] : self.starts[i] + len(self.sequences[i].input_ids)] = True
        labels_live = live[self.label_rows] if len(self.label_rows) else np.zeros(0, dtype=bool)
        index = torch.from_numpy(np.flatnonzero(live)).to(self.device)
        self.head_rows = int(labels_live[: self.head_rows].sum())
        self.head_batch = None  # its rows begin anew
        self.partial_rows = int(live[self.forward_rows : self.forward_rows + self.partial_rows].sum())
        self.partial_layer *= self.partial_rows > 0
        self.forward_rows = int(live[: self.forward_rows].sum())
        self.undone = int(live[: self.undone].sum())
        left: list[int] = []
        if self._store is not None:
            self._store, left = self._store.keep_only(index, self.layer + 1)
        if self._parked is not None:
            self._parked.keep_only(index.cpu())
        labels_index = torch.from_numpy(np.flatnonzero(labels_live)).to(self.device)
        self.final, self.dy = _rows(self.final, labels_index, 0), _rows(self.dy, index, 0)
        self.dk, self.dv = _rows(self.dk, index, 1), _rows(self.dv, index, 1)
        self.sequences = [self.sequences[i] for i in keep]
        self._lay_out()
        if self.undone == 0 and self.layer >= 0:
            self.finish_layer()  # of the current layer only rows of the job that leaves were left
        return left


def _by_step(spans: list[Span]) -> list[list[Span]]:
    groups: list[list[Span]] = []
    for span in spans:
        if groups and groups[-1][0].sequence.step is span.sequence.step:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _rows(t: Tensor | None, index: Tensor, dim: int) -> Tensor | None:
    return None if t is None else t.index_select(dim, index)


def _dropout_of(step: JobStep, spans: list[Span], device: torch.device) -> Callable[[Site], Dropout]:
    keys = RowKeys.of([(s.sequence.number, s.start - s.first, s.end - s.start) for s in spans], device)

    def at(site: Site) -> Dropout:
        return lambda x: dropout_rows(x, step.dropout, step.dropout_key, site.name, keys)

    return at
