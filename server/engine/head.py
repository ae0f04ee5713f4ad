"""Head units: label rows through the model's own head, to loss and to the gradient of the last layer's output.

With logits z of a row, p = softmax(z), label c and the row's weight m = 1 / (loss-bearing tokens of its step),

    loss += -m log p_c,      dz = m (p - onehot(c)).

A vocabulary is large (one row of 262k logits is a megabyte, and streaming its weights takes longer than a decode
step), so a batch of rows goes over it in slices: first the logits of every slice, with a running log-sum-exp, then
the gradient of every slice, written over its logits. A unit may stop after any slice; the result is the same to the
bit however the slices are spread over units.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.transfer import to_device
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep


def head_steps(model: BaseModel, backward: bool) -> int:
    """Sub-steps of one batch: a slice of the vocabulary forward, or backward."""
    return len(model.head.slices) * (2 if backward else 1)


def run_head_unit(model: BaseModel, sweep: Sweep, rows: int, steps: int | None = None) -> None:
    """Take the next `rows` label rows, or the unfinished batch, `steps` sub-steps further (None: to its end)."""
    batch = sweep.head_batch
    if batch is None:
        batch = sweep.head_batch = HeadBatch(sweep, rows)
    left = head_steps(model, sweep.backward) - batch.steps
    for _ in range(left if steps is None else min(steps, left)):
        batch.advance(model)
    if batch.steps == head_steps(model, sweep.backward):
        batch.finish()
        sweep.head_batch = None


class HeadBatch:
    """Some label rows of a sweep on their way through the head."""

    def __init__(self, sweep: Sweep, rows: int) -> None:
        if sweep.final is None:
            raise RuntimeError("the sweep has no forwarded label rows")
        self._sweep = sweep
        self.start = sweep.head_rows
        self.end = min(self.start + rows, self.start + sweep.head_ready)
        self.steps = 0
        # A copy: forward windows go on writing their rows of `final` while this batch is part-way.
        self._hidden = sweep.final[self.start : self.end].clone().requires_grad_(sweep.backward)
        self._targets = sweep.label_targets[self.start : self.end]  # on the host, so that no one waits for them
        self._logits: list[Tensor | None] = []  # per slice [R, slice], kept for the backward
        self._lse: Tensor | None = None  # [R] over the slices so far
        self._best: Tensor | None = None  # [R] largest logit so far
        wide = torch.promote_types(sweep.dtype, torch.float32)
        self._chosen = torch.zeros(self.rows, dtype=wide, device=sweep.device)  # [R] the labels' logits
        self._gradient = torch.zeros_like(self._hidden) if sweep.backward else None

    @property
    def rows(self) -> int:
        return self.end - self.start

    def tensors(self) -> list[Tensor | None]:
        """What it keeps between two sub-steps."""
        return [self._hidden, *self._logits, self._lse, self._best, self._chosen, self._gradient]

    def advance(self, model: BaseModel) -> None:
        """One sub-step."""
        count = len(model.head.slices)
        if self.steps < count:
            self._forward(model, self.steps)
        else:
            self._backward(model, self.steps - count)
        self.steps += 1

    def _forward(self, model: BaseModel, index: int) -> None:
        with torch.set_grad_enabled(self._sweep.backward):
            logits = model.logits_slice(self._hidden, index)
        z = logits.detach().to(self._chosen.dtype)
        lse, best = torch.logsumexp(z, -1), z.amax(-1)
        self._lse = lse if self._lse is None else torch.logaddexp(self._lse, lse)
        self._best = best if self._best is None else torch.maximum(self._best, best)
        rows, columns = self._labels_in(model.head.slices[index])
        self._chosen[rows] = z[rows, columns]
        if self._sweep.backward:
            self._logits.append(logits)

    def _backward(self, model: BaseModel, index: int) -> None:
        logits = self._logits[index]
        if logits is None or self._lse is None or self._gradient is None:
            raise RuntimeError("the slice's logits are gone")
        # `.data`: p is written over the logits, which nothing in the head's own backward reads (a head that did
        # would fail the load-time probe).
        p = logits.data.to(self._chosen.dtype).sub_(self._lse[:, None]).exp_()
        rows, columns = self._labels_in(model.head.slices[index])
        p[rows, columns] -= 1.0
        (part,) = torch.autograd.grad(logits, self._hidden, p.to(logits.dtype))
        self._gradient += part
        self._logits[index] = None

    def finish(self) -> None:
        """Hand loss and gradient over; the rows are through."""
        sweep = self._sweep
        if self._lse is None or self._best is None:
            raise RuntimeError("the batch has not been through the head")
        steps = [sweep.sequences[int(owner)].step for owner in sweep.label_owner[self.start : self.end]]
        losses, correct = self._lse - self._chosen, self._chosen >= self._best
        first = 0
        for _, same in itertools.groupby(steps, key=id):
            rows = list(same)
            part = slice(first, first + len(rows))
            rows[0].add_losses(losses[part], correct[part])
            first = part.stop
        if self._gradient is not None:
            # A row's weight scales its whole gradient: apply it to H numbers, not to V.
            weight = torch.tensor([[1.0 / step.loss_tokens] for step in steps], dtype=self._gradient.dtype)
            weight = to_device(weight, sweep.device)
            if sweep.dy is None:
                sweep.dy = self._gradient.new_zeros(sweep.rows, self._gradient.shape[1])
            index = to_device(torch.from_numpy(sweep.label_rows[self.start : self.end]), sweep.device)
            sweep.dy[index] = self._gradient * weight
        sweep.head_rows = self.end
        if sweep.head_left == 0 and sweep.forward_done:
            sweep.final = None

    def _labels_in(self, part: slice) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the labels that lie in this slice of the vocabulary."""
        rows = np.flatnonzero((self._targets >= part.start) & (self._targets < part.stop))
        both = to_device(torch.from_numpy(np.stack([rows, self._targets[rows] - part.start])), self._sweep.device)
        return both[0], both[1]
