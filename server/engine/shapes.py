"""What a model keeps a token in each layer's cache, and how far its layers look back, read off one run of them."""

from __future__ import annotations

import torch
from torch import Tensor

from coserve.kernels.attention.training import Score
from coserve.server.engine.backend import AdapterTerms
from coserve.server.engine.kv_cache import LayerShape
from coserve.server.engine.model import BaseModel
from coserve.server.engine.siblings import OneRow
from coserve.server.training.peft.sites import Site


class _ShapePass(OneRow):
    """A pass of one row whose attention reads only the row itself, and notes the shapes it was given."""

    def __init__(self, adapters: AdapterTerms) -> None:
        self.adapters = adapters
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}

    def stored(self, site: Site) -> Tensor | None:
        return None

    def keep(self, site: Site, product: Tensor) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        self.shapes[layer] = LayerShape(k.shape[0], k.shape[2], v.shape[2], q.shape[0])
        self.windows[layer] = score.sliding_window
        return super().attend(layer, q, k, v, score, sinks)


def layer_shapes(model: BaseModel) -> list[LayerShape]:
    """One entry a layer; raises RuntimeError for a layer without attention of the usual kind."""
    current = _looked_at(model)
    return [current.shapes[layer] for layer in range(model.layer_count)]


def layer_windows(model: BaseModel) -> tuple[int | None, ...]:
    """Tokens that each layer attends to at most, None for all; empty where all layers attend to all."""
    windows = _looked_at(model).windows
    return tuple(windows[layer] for layer in range(model.layer_count)) if any(windows.values()) else ()


@torch.no_grad()
def _looked_at(model: BaseModel) -> _ShapePass:
    current = _ShapePass(model.backend.adapters([]))
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    x, calls = model.frame.begin(zero, zero)
    for layer, call in enumerate(calls):
        x = model.run_layer(layer, x, call, current)
    missing = [layer for layer in range(model.layer_count) if layer not in current.shapes]
    if missing:
        raise RuntimeError(f"layers {missing} have no attention over keys and values")
    return current
