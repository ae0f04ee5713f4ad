"""A causal language model of transformers taken apart at its decoder layers, without touching its code.

Everything of the model except its decoder layers is its *frame*: what happens before the first layer
(embedding, scaling, rotary tables, the keyword arguments of each layer) and after the last (final norm, head,
logit scaling or capping). The frame is a shallow copy of the model in which every decoder layer is replaced by
a recorder, so the model's own forward runs unchanged around them. The layers themselves are called one by
one, which lets an iteration stop at any layer boundary and a backward unit run one layer alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments the model's own forward passes to one decoder layer, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for one decoder layer: notes its call; passes on one row, or the hidden states that `end` sets."""

    def __init__(self, layer: nn.Module, frame: Frame) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_frame", frame)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers between calls, for instance `attention_type`.
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._frame._record(hidden_states, LayerCall(args, kwargs))


class Frame:
    """`begin`, `calls` and `end` of a causal LM. Not reentrant; calls no decoder layer."""

    def __init__(self, model: Any, base_name: str, layers_name: str) -> None:
        base = getattr(model, base_name)
        self._layers = getattr(base, layers_name)
        self._hidden_size = int(model.config.hidden_size)
        self._returns_tuple = False
        self._recorded: list[LayerCall] = []
        self._first_input: Tensor | None = None
        self._preset: Tensor | None = None
        recorders = nn.ModuleList(_Recorder(layer, self) for layer in self._layers)
        self._base = _with_module(base, layers_name, recorders)
        self._model = _with_module(model, base_name, self._base)
        self._parameter = next(model.parameters())

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    def set_layer_output(self, output: Any) -> None:
        """Learn from one real layer whether the model's layers return a tuple or a tensor."""
        self._returns_tuple = isinstance(output, tuple)

    def begin(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """input_ids, positions int64 [T] -> input of layer 0 [1, T, H] and the call of every layer."""
        self._forget()
        self._base(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return self._take()

    def calls(self, positions: Tensor) -> list[LayerCall]:
        """The layers' calls for rows at `positions` int64 [T], without their hidden states."""
        self._forget()
        blank = self._parameter.new_zeros(1, 1, 1).expand(1, positions.shape[0], self._hidden_size)
        self._base(inputs_embeds=blank, position_ids=positions[None], use_cache=False)
        return self._take()[1]

    def end(self, hidden: Tensor) -> Tensor:
        """Output of the last layer [R, H] -> the model's logits [R, V]. Differentiable in hidden."""
        self._preset = hidden[None]
        try:
            blank = hidden.detach().new_zeros(1, 1, self._hidden_size)
            position = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
            return self._model(inputs_embeds=blank, position_ids=position, use_cache=False).logits[0]
        finally:
            self._preset = None
            self._take()

    def _record(self, hidden_states: Tensor, call: LayerCall) -> Any:
        if self._first_input is None:
            self._first_input = hidden_states
        self._recorded.append(call)
        # One row is enough for what follows in `begin`; norm and head then cost nothing.
        out = hidden_states[:, :1] if self._preset is None else self._preset
        return (out,) if self._returns_tuple else out

    def _take(self) -> tuple[Tensor, list[LayerCall]]:
        first, recorded = self._first_input, self._recorded
        self._forget()
        if first is None or len(recorded) != len(self._layers):
            raise RuntimeError(f"the model called {len(recorded)} of its {len(self._layers)} decoder layers")
        return first, recorded

    def _forget(self) -> None:
        """Also what a call that ended in an exception has recorded."""
        self._first_input, self._recorded = None, []


def _with_module(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A shallow copy of `module` that shares every parameter, with one child replaced."""
    clone = copy.copy(module)
    clone.__dict__["_modules"] = {**module._modules, name: child}
    return clone
