"""Head units: label rows through the model's own head, to loss and to the gradient of the last layer's output.

With logits z of a row, p = softmax(z), label c and the row's weight m = 1 / (loss-bearing tokens of its step),

    loss += -m log p_c,      dz = m (p - onehot(c)).

Logits live for one unit only: one row of a 262k vocabulary is a megabyte. Fewer passes over them is what counts
here: log-softmax, its maximum, and exp in place.
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
    losses, correct, dz = _cross_entropy(logits.detach(), targets, sweep.backward)
    for step, loss, hit in zip(steps, losses.tolist(), correct.tolist(), strict=True):
        step.loss_sum += loss
        step.correct += hit
    if dz is not None:
        (d_hidden,) = torch.autograd.grad(logits, hidden, dz)
        # A row's weight scales its whole gradient: apply it to H numbers, not to V.
        weight = torch.tensor([[1.0 / step.loss_tokens] for step in steps], dtype=d_hidden.dtype, device=sweep.device)
        if sweep.dy is None:
            sweep.dy = hidden.new_zeros(sweep.rows, hidden.shape[1])
        sweep.dy[torch.from_numpy(sweep.label_rows[start:end]).to(sweep.device)] = d_hidden * weight
    sweep.head_rows = end
    if sweep.head_left == 0 and sweep.forward_done:
        sweep.final = None


def _cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """logits [R, V], targets int64 [R] -> -log p [R], hit [R], and p - onehot [R, V] in the logits' dtype."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits, -1, dtype=wide)
    chosen = log_p.gather(1, targets[:, None]).squeeze(1)
    correct = chosen >= log_p.amax(-1)
    losses = -chosen
    if not gradient:
        return losses, correct, None
    dz = log_p.exp_()
    dz[torch.arange(dz.shape[0], device=dz.device), targets] -= 1.0
    return losses, correct, dz.to(logits.dtype)
