"""A LoRA training loop as one writes it with PEFT and torch's AdamW, on a model at hand, in this process.

All of it in the model's dtype, the adapter too (PEFT's quickest form), torch's flash attention, no padding. Every token
bears a loss. Micro-batches are as large as memory allows, up to the whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of a step; bytes held between forward and backward, and at the peak, of one micro-batch of `rows`."""

    seconds: float
    rows: int
    stored: int | None
    peak: int | None


class PeftLoop:
    """Takes the model over."""

    def __init__(self, model: Any, rank: int, clock: Any, memory: Any) -> None:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self._model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, weight_decay=0.0)
        self._clock, self._memory = clock, memory
        self.attention = "flash"

    def measure(self, rows: torch.Tensor, steps: int, *, checkpointing: bool) -> Measured:
        """rows int64 [batch, length]. Raises torch.OutOfMemoryError where not even single rows fit."""
        if checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._model.enable_input_require_grads()
        try:
            micro = rows.shape[0]
            while True:
                try:
                    self._step(rows, micro)
                    break
                except torch.OutOfMemoryError:
                    if micro == 1:
                        raise
                    micro = (micro + 1) // 2
                except RuntimeError as error:
                    if self.attention != "flash" or "No available kernel" not in str(error):
                        raise
                    self.attention = "torch's choice, flash attention is not available here"
                self._optimizer.zero_grad()
                self._memory.release()
            stored, peak = self._bytes(rows[:micro])
            seconds = self._clock.median(lambda _: self._step(rows, micro), steps, warm=1)
        finally:
            self._optimizer.zero_grad()
            if checkpointing:
                self._model.gradient_checkpointing_disable()
                self._model.disable_input_require_grads()
            self._memory.release()
        return Measured(seconds, micro, stored, peak)

    def _step(self, rows: torch.Tensor, micro: int) -> None:
        for first in range(0, len(rows), micro):
            part = rows[first : first + micro]
            self._gradients(part, len(part) / len(rows))
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def _gradients(self, rows: torch.Tensor, share: float, between: Callable[[], object] = lambda: None) -> None:
        """Forward and backward, of the same attention: checkpointing runs the forward again in the latter."""
        flash = self.attention == "flash"
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext():
            loss = self._model(input_ids=rows, labels=rows, use_cache=False).loss
            between()
            (loss * share).backward()

    def _bytes(self, rows: torch.Tensor) -> tuple[int | None, int | None]:
        """(between forward and backward, at the peak) above what stands before: weights, gradients, optimizer."""
        self._memory.release()
        before, between = self._memory.held(), list[int | None]()
        self._memory.reset()
        self._gradients(rows, 1.0, lambda: between.append(self._memory.held()))
        peak = self._memory.peak()
        self._optimizer.zero_grad(set_to_none=False)
        if before is None or between[0] is None or peak is None:
            return None, None
        return between[0] - before, peak - before
