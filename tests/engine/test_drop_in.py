"""Modules give way to functions by what they compute, not by their names; what computes another thing stays."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from coserve.kernels.layer import reference
from coserve.server.engine.drop_in import LayerFunctions, replace_modules

torch.set_num_threads(1)

FUNCTIONS = LayerFunctions(reference.rms_norm, reference.rope, reference.gated)


@pytest.mark.parametrize("architecture,norms,mlps,rotary", [
    ("llama", 7, 3, 3), ("gemma3_text", 25, 4, 4), ("qwen3", 13, 3, 3), ("phi3", 7, 3, 3), ("granite", 7, 3, 3),
    # Its norms subtract the mean, and its rotary embedding turns neighbouring columns: both stay.
    ("cohere", 0, 3, 0),
])  # fmt: skip
def test_what_says_the_same_is_replaced(architecture, norms, mlps, rotary):
    model = tiny_model(architecture)
    replaced = copy.deepcopy(model)
    kinds = list(replace_modules(replaced, FUNCTIONS).values())
    assert [kinds.count(kind) for kind in ("norm", "mlp", "rotary")] == [norms, mlps, rotary]
    ids = torch.arange(40)[None] % 500 + 3
    with torch.no_grad():
        got, want = (m(input_ids=ids, use_cache=False).logits for m in (replaced, model))
    assert float((got - want).norm() / want.norm()) < 1e-5


class Doubled(nn.Module):
    """Looks like a norm, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * reference.rms_norm(x, self.weight, self.eps)


class ThreeLinears(nn.Module):
    """Looks like a gated MLP; its halves are added."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) + self.up_proj(x))


def test_what_only_looks_alike_stays():
    model = nn.ModuleDict({"norm": Doubled(), "mlp": ThreeLinears()})
    assert replace_modules(model, FUNCTIONS) == {}
    assert isinstance(model["norm"], Doubled) and isinstance(model["mlp"], ThreeLinears)


def test_a_function_that_is_wrong_replaces_nothing():
    def off(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False) -> torch.Tensor:
        return reference.rms_norm(x, weight, 2 * eps, unit_offset=unit_offset)

    wrong = LayerFunctions(off, lambda x, cos, sin: x, lambda gate, up, activation: gate * up)
    assert replace_modules(tiny_model("llama"), wrong) == {}
