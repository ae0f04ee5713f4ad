"""AdamW over an adapter's master weights, learning rate schedules and clipping, as torch and transformers define them.

torch.optim.AdamW does the arithmetic on the masters; what is here feeds it, and saves and restores its state exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from coserve.server.training.peft.lora import LoraPair, LoraWeights
from coserve.server.training.spec import TrainingSpec
from coserve.server.training.storages import storage_bytes

STATE_PARTS = ("step", "exp_avg", "exp_avg_sq")


def lr_at(updates: int, spec: TrainingSpec, total_steps: int) -> float:
    """The learning rate of the step that follows `updates` steps, as transformers.get_scheduler sets it.

    With a warm-up the very first step has rate 0; "constant" with a warm-up is its constant_with_warmup.
    """
    if updates < spec.warmup_steps:
        factor = float(updates) / float(max(1, spec.warmup_steps))
    elif spec.lr_scheduler == "constant":
        factor = 1.0
    else:
        decay_steps = float(max(1, total_steps - spec.warmup_steps))
        if spec.lr_scheduler == "linear":
            factor = max(0.0, float(total_steps - updates) / decay_steps)
        else:
            progress = float(updates - spec.warmup_steps) / decay_steps
            # half a cycle; the factors stand in this order so that the rounding is the same
            factor = max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
    return spec.learning_rate * factor


class AdamW:
    """The optimizer of one job. `params` are changed in place; they must be leaves of their final dtype and device."""

    def __init__(self, params: LoraWeights, spec: TrainingSpec) -> None:
        self._named = dict(_named(params))
        self._max_norm = spec.max_grad_norm
        self._torch = torch.optim.AdamW(
            list(self._named.values()),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
        )
        self.held_bytes = self._count()  # of parameters and state, on the parameters' device

    def load_gradients(self, grads: Mapping[str, LoraPair]) -> float:
        """Take one gradient for every parameter and clip them to the global norm; returns the norm before clipping.

        Raises KeyError for a missing site and ValueError for a wrong shape.
        """
        for name, pair in grads.items():
            for matrix, gradient in (("a", pair.a), ("b", pair.b)):
                parameter = self._named[f"{name}.{matrix}"]
                if gradient.shape != parameter.shape:
                    raise ValueError(
                        f"gradient of {name}.{matrix} has shape {list(gradient.shape)}, not {list(parameter.shape)}"
                    )
                parameter.grad = gradient.to(device=parameter.device, dtype=parameter.dtype, copy=True)
        missing = [name for name, parameter in self._named.items() if parameter.grad is None]
        if missing:
            raise KeyError(f"no gradient for {missing[0]}")
        # an infinite bound changes nothing: clipping multiplies by min(1, bound / norm)
        bound = self._max_norm if self._max_norm else math.inf
        return float(torch.nn.utils.clip_grad_norm_(self._named.values(), bound))

    def step(self, learning_rate: float) -> bool:
        """One update with the loaded gradients; returns whether all parameters are still finite."""
        for group in self._torch.param_groups:
            group["lr"] = learning_rate
        first = not self._torch.state
        self._torch.step()
        if first:
            self.held_bytes = self._count()  # from here on it never changes
        self.drop_gradients()
        # one norm over all: one value comes back from the device, not one a parameter
        return math.isfinite(float(torch.nn.utils.get_total_norm(self._named.values())))

    def drop_gradients(self) -> None:
        self._torch.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The whole state by name; empty before the first update."""
        return {
            f"{name}.{part}": self._torch.state[parameter][part]
            for name, parameter in self._named.items()
            if parameter in self._torch.state
            for part in STATE_PARTS
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what state_tensors() gave. Raises ValueError when it does not fit the parameters."""
        if not tensors:
            return
        expected = {f"{name}.{part}" for name in self._named for part in STATE_PARTS}
        if set(tensors) != expected:
            raise ValueError("the optimizer state is of other parameters")
        for name, parameter in self._named.items():
            step, first, second = (tensors[f"{name}.{part}"] for part in STATE_PARTS)
            if first.shape != parameter.shape or second.shape != parameter.shape or step.shape != ():
                raise ValueError(f"the optimizer state of {name} has another shape")
            self._torch.state[parameter] = {
                "step": step.clone(),  # torch keeps the count on the CPU
                "exp_avg": first.to(device=parameter.device, dtype=parameter.dtype, copy=True),
                "exp_avg_sq": second.to(device=parameter.device, dtype=parameter.dtype, copy=True),
            }
        self.held_bytes = self._count()

    def _count(self) -> int:
        parameters = list(self._named.values())
        return storage_bytes([*parameters, *self.state_tensors().values()], parameters[0].device)


def _named(params: LoraWeights) -> Iterator[tuple[str, torch.Tensor]]:
    for name, pair in params.items():
        yield f"{name}.a", pair.a
        yield f"{name}.b", pair.b
