"""Linear layers that know adapters: siblings share one frozen product, the pass at hand adds its adapters' terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from coserve.server.engine.backend import AdapterTerms
from coserve.server.engine.product import FrozenProduct
from coserve.server.training.peft.sites import Site


class RowsOfPass(Protocol):
    """The rows of one layer call, as linear layers need to know them."""

    adapters: AdapterTerms

    def stored(self, site: Site) -> Tensor | None:
        """The frozen product of these rows, if it was kept by an earlier pass: [T, out]."""

    def keep(self, site: Site, product: Tensor) -> None:
        """Offered the frozen product [T, out], before the adapters' terms are added. It must be copied."""


class Binding:
    """Holds the pass of the layer call under way, for the linear layers that get no keyword arguments."""

    def __init__(self) -> None:
        self.current: RowsOfPass | None = None

    @property
    def current_pass(self) -> RowsOfPass:
        if self.current is None:
            raise RuntimeError("a linear layer was called outside of a pass")
        return self.current


class LinearGroup:
    """Linear layers that are given the same rows: the first one called computes the outputs of all."""

    def __init__(
        self, product: FrozenProduct, sites: Sequence[Site], layout: Mapping[str, tuple[int, int]], first: int,
        binding: Binding,
    ) -> None:  # fmt: skip
        """
        Args:
            layout: name -> (in, out) of all sites of the model, each group's side by side; complete once the model is.
            first: where this group's stand in it.
        """
        self.product, self.sites, self.layout, self.first = product, tuple(sites), layout, first
        self._binding = binding
        self._input: tuple[Tensor, int] | None = None  # the rows at hand, and their version when they were read
        self._results: dict[int, Tensor] = {}  # what was computed of them and not taken yet

    def result(self, member: int, x: Tensor) -> Tensor:
        """x [1, T, in] -> rows [T, out] of that member."""
        known = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if not known or member not in self._results:
            rows = x.reshape(-1, self.sites[0].in_features)
            current = self._binding.current_pass
            self._results = dict(enumerate(current.adapters.linear(self, rows, current)))
            self._input = (x, x._version)
        y = self._results.pop(member)
        if not self._results:
            self._input = None
        return y

    def stored(self, current: RowsOfPass) -> list[Tensor] | None:
        """The frozen products of the pass's rows, if all of them were kept."""
        found = [current.stored(site) for site in self.sites]
        known = [part for part in found if part is not None]
        return known if len(known) == len(found) else None


class AdapterLinear(nn.Module):
    """A frozen linear layer to whose rows the pass's adapters are added."""

    def __init__(self, group: LinearGroup, member: int, weight: Tensor) -> None:
        super().__init__()
        self.site = group.sites[member]
        self._group, self._member = group, member
        self.in_features, self.out_features = self.site.in_features, self.site.out_features
        # Some modeling code looks at shape, dtype and device of a weight. Its values are in the group's product.
        self.weight = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, in] -> [1, T, out]"""
        return self._group.result(self._member, x).view(*x.shape[:-1], self.out_features)
