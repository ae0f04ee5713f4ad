"""Which linear layers of a decoder layer are given the same rows, found by running the layer once.

Query, key and value read one tensor, gate and up another; in models with parallel branches all five read the
same. One row goes through every layer, and linear layers that were called with the very same tensor are
siblings: their products can be computed as one. Nothing is assumed about names or architectures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coserve.kernels.attention.training import Score
from coserve.server.engine.frame import Frame


class OneRow:
    """What `coserve_attention` asks of a pass, for one row that sees only itself."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        return v.repeat_interleave(q.shape[0] // v.shape[0], 0).transpose(0, 1)


@torch.no_grad()
def sibling_linears(frame: Frame, layers: nn.ModuleList) -> list[list[list[str]]]:
    """Per decoder layer, the names of its linear layers in groups, both in the order of the calls.

    A linear layer that was not called stands in no group.
    """
    zero = torch.zeros(1, dtype=torch.int64, device=frame.device)
    x, calls = frame.begin(zero, zero)
    found = []
    for layer, call in zip(layers, calls, strict=True):
        groups: list[tuple[Tensor, list[str]]] = []
        handles = [
            module.register_forward_pre_hook(_note(name, groups))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            out = layer(x, *call.args, **call.kwargs, engine_ctx=OneRow())
        finally:
            for handle in handles:
                handle.remove()
        x = out[0] if isinstance(out, tuple) else out
        frame.set_layer_output(out)
        found.append([names for _, names in groups])
    return found


def _note(name: str, groups: list[tuple[Tensor, list[str]]]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        for rows, names in groups:
            if rows is args[0]:
                names.append(name)
                return
        groups.append((args[0], [name]))

    return hook
