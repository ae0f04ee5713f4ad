"""LoRA's parameters: the config, one pair of matrices a site, and their initial values.

B is kept as rank rows [r, out], the transpose of PEFT's [out, r]; a module's output is
y = W x + scaling * B^T (A x). Source: Hu et al. 2021; rsLoRA's scaling: Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from coserve.server.training.peft.sites import ALL_LINEAR, PatternTable, Site, select_sites

MAX_RANK = 1024


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of a PEFT LoRA config matters here; field meanings are PEFT's."""

    r: int
    alpha: float
    target_modules: str | tuple[str, ...] = ALL_LINEAR  # "all-linear", an expression, or names
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # in order: the first match counts
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None

    def sites(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """Those of `sites` that this config targets, in their order. Raises PatternError."""
        return select_sites(
            sites,
            self.target_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            exclude_modules=self.exclude_modules,
        )

    def shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, float]]:
        """(rank, scaling) of every targeted site, by name. Raises PatternError."""
        ranks, alphas = PatternTable(self.rank_pattern), PatternTable(self.alpha_pattern)
        result: dict[str, tuple[int, float]] = {}
        for site in self.sites(sites):
            rank = int(ranks.get(site.name, self.r))
            alpha = alphas.get(site.name, self.alpha)
            result[site.name] = rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return result

    def with_names(self, sites: Sequence[Site]) -> LoraConfig:
        """The same config with "all-linear" spelt out as module names, so that it means the same anywhere."""
        if not isinstance(self.target_modules, str) or self.target_modules.lower() != ALL_LINEAR:
            return self
        chosen = self.sites(sites)
        suffixes = tuple(sorted({site.name.rsplit(".", 1)[-1] for site in chosen}))
        by_suffix = replace(self, target_modules=suffixes)
        if by_suffix.sites(sites) == chosen:
            return by_suffix
        return replace(self, target_modules=tuple(site.name for site in chosen))


@dataclass(slots=True)
class LoraPair:
    """One site's matrices, or their gradients."""

    a: torch.Tensor  # [r, in_features]
    b: torch.Tensor  # [r, out_features]
    scaling: float = 1.0


LoraWeights = dict[str, LoraPair]  # site name -> pair, in the model's order


def init_lora(sites: Sequence[Site], config: LoraConfig, seed: int) -> LoraWeights:
    """PEFT's default initial values, float32 on the CPU: kaiming-uniform A, zero B.

    Equal bit for bit to `torch.manual_seed(seed); get_peft_model(model, config)` when `sites` are in the order of the
    model's named_modules(). PEFT builds both matrices as linear layers, which fills them with random
    values, and then fills A again: the first two fills are repeated here to stand at the same place of the stream.
    """
    generator = torch.Generator().manual_seed(seed)
    by_name = {site.name: site for site in sites}
    weights: LoraWeights = {}
    for name, (rank, scaling) in config.shapes(sites).items():
        site = by_name[name]
        a = torch.empty(rank, site.in_features)
        b = torch.empty(site.out_features, rank)
        for matrix in (a, b, a):
            torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        weights[name] = LoraPair(a, torch.zeros(rank, site.out_features), scaling)
    return weights


def cast_weights(weights: LoraWeights, device: torch.device | str, dtype: torch.dtype) -> LoraWeights:
    """A copy of the weights on `device` in `dtype`."""
    return {
        name: LoraPair(
            pair.a.detach().to(device=device, dtype=dtype, copy=True).contiguous(),
            pair.b.detach().to(device=device, dtype=dtype, copy=True).contiguous(),
            pair.scaling,
        )
        for name, pair in weights.items()
    }
