"""One step of a job while its rows are in sweeps: its adapter, and the sums of gradients and losses over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coserve.server.engine.backend import Adapter
from coserve.server.training.peft.sites import Site


@dataclass(slots=True)
class JobStep:
    """One optimizer step (or evaluation) of one job, while its sequences are in sweeps."""

    job_id: str
    adapter: Adapter  # the training copy, at the rounded weights
    loss_tokens: int  # label-bearing tokens of the whole step, fixed before its first head unit
    dropout: float = 0.0
    dropout_key: tuple[int, int] = (0, 0)  # (job seed, step)
    grads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # site name -> (dA, dB), float32 or wider
    _loss_sum: float = field(default=0.0, init=False)
    _correct: int = field(default=0, init=False)
    _unread: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)  # still on the device

    @property
    def loss_sum(self) -> float:
        """Sum of -log p over the labels seen so far. Waits for the device."""
        self._read()
        return self._loss_sum

    @property
    def correct(self) -> int:
        """Labels that were the most likely token. Waits for the device."""
        self._read()
        return self._correct

    def add_losses(self, losses: Tensor, hits: Tensor) -> None:
        """losses [r] and hits bool [r] of some labels; read later, so that the iteration goes on."""
        self._unread.append((losses, hits))

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for losses, hits in unread:
            for loss, hit in zip(losses.tolist(), hits.tolist(), strict=True):
                self._loss_sum += loss
                self._correct += hit

    def add_gradient(self, site: Site, da: Tensor, db: Tensor) -> None:
        wide = torch.promote_types(da.dtype, torch.float32)
        if site.name in self.grads:
            for total, part in zip(self.grads[site.name], (da, db), strict=True):
                total += part
        else:
            self.grads[site.name] = (da.to(wide), db.to(wide))


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One training sequence before packing: aligned ids and labels, as in transformers (-100 bears no loss)."""

    step: JobStep
    input_ids: np.ndarray  # int [L]
    labels: np.ndarray  # int [L]
    number: int = 0  # its place in the step: part of the dropout key
