"""An adapter that lies in a pool, as passes know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from coserve.server.engine.adapter_pool import AdapterPool, default_page_elements
from coserve.server.engine.host_image import Weights
from coserve.server.engine.page_source import OwnPages
from coserve.server.training.peft.sites import Site


class PooledAdapter:
    """A resident version, or a training copy. One object an adapter: its neighbouring rows share a product."""

    def __init__(self, pool: AdapterPool, key: str) -> None:
        self.pool, self.key = pool, key

    def pair(self, site: Site) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, in], B [r, out], scaling), as it is while the rows run."""
        return self.pool.tensors(self.key, site.name)


class PoolUser(Protocol):
    """What a pool needs to know of a model."""

    @property
    def hidden_size(self) -> int: ...

    dtype: torch.dtype
    device: torch.device


def pool_of(model: PoolUser, adapters: Sequence[Weights]) -> list[PooledAdapter]:
    """Training copies in a pool of their own that just holds them."""
    page_elements = default_page_elements(model.hidden_size)
    tensors = [t for weights in adapters for pair in weights.values() for t in (pair.a, pair.b)]
    pages = sum(-(-t.numel() // page_elements) for t in tensors)
    pool = AdapterPool(OwnPages(pages, page_elements, model.dtype, model.device))
    for number, weights in enumerate(adapters):
        pool.load(str(number), weights, pinned=True, fold_scaling=False)
    return [PooledAdapter(pool, str(number)) for number in range(len(adapters))]
