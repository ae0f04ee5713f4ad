"""Head units: label rows through the model's own head, to loss and to the gradient of the last layer's output.

With logits z of a row, p = softmax(z), label c and the row's weight m = 1 / (loss-bearing tokens of its step),

    loss += -m log p_c,      dz = m (p - onehot(c)).

Logits live for one unit only, and the gradient is written over them: one row of a 262k vocabulary is a megabyte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep


def run_head_unit(model: BaseModel, sweep: Sweep, rows: int) -> None:
    """The next `rows` label rows that are through the forward and not yet through the head."""
    start = sweep.head_rows
    end = min(start + rows, start + sweep.head_ready)
    if sweep.final is None:
        raise RuntimeError("the sweep has no forwarded label rows")
    hidden = sweep.final[start:end].detach().requires_grad_(sweep.backward)
    owners = sweep.label_owner[start:end]
    steps = [sweep.sequences[int(owner)].step for owner in owners]
    targets = torch.from_numpy(sweep.label_targets[start:end]).to(sweep.device)

    with torch.set_grad_enabled(sweep.backward):
        logits = model.frame.end(hidden)
    # `.data`: the gradient is written over the logits, which nothing in the head's own backward reads (a head
    # that did would fail the load-time probe).
    losses, correct, dz = _cross_entropy(logits.data, targets, steps_weight(steps, logits), sweep.backward)
    for step, loss, hit in zip(steps, losses.tolist(), correct.tolist(), strict=True):
        step.loss_sum += loss
        step.correct += hit
    if sweep.backward and dz is not None:
        (d_hidden,) = torch.autograd.grad(logits, hidden, dz)
        if sweep.dy is None:
            sweep.dy = hidden.new_zeros(sweep.rows, hidden.shape[1])
        sweep.dy[torch.from_numpy(sweep.label_rows[start:end]).to(sweep.device)] = d_hidden
    sweep.head_rows = end
    if sweep.head_left == 0 and sweep.forward_done:
        sweep.final = None


def steps_weight(steps: list, logits: Tensor) -> Tensor:
    """[R] weight of each row's loss."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.tensor([1.0 / step.loss_tokens for step in steps], dtype=wide, device=logits.device)


def _cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logits [R, V] (overwritten when it is wide enough), targets int64 [R], weight [R]
    -> -log p [R], hit int64 [R], and dz [R, V] in the logits' dtype."""
    z = logits.to(weight.dtype)
    correct = (z.argmax(-1) == targets).to(torch.int64)
    peak = z.amax(-1, keepdim=True)
    chosen = z.gather(1, targets[:, None]).squeeze(1)
    z = z.sub_(peak).exp_()
    total = z.sum(-1, keepdim=True)
    losses = (total.log() + peak).squeeze(1) - chosen
    if not gradient:
        return losses, correct, None
    z = z.mul_(weight[:, None] / total)
    rows = torch.arange(z.shape[0], device=z.device)
    z[rows, targets] -= weight
    return losses, correct, z.to(logits.dtype)
