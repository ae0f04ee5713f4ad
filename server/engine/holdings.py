"""Who holds the device's memory: bytes of the storages behind the tensors of each part, as /metrics shows them.

Model and cache never change their size and are counted once, the rest anew at every report. Nothing here is an
estimate, and nothing here allocates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep
from coserve.server.engine.trainer import Trainer
from coserve.server.training.storages import storage_bytes

if TYPE_CHECKING:
    from coserve.server.engine.decode_graphs import DecodeGraphs  # it imports Triton


class Holdings:
    """Of one engine. Belongs to the loop."""

    def __init__(
        self, model: BaseModel, cache: KVCache, pool: AdapterPool, trainer: Trainer, loader: AdapterLoader,
        graphs: DecodeGraphs | None = None,
    ) -> None:  # fmt: skip
        self._device = model.device
        self._trainer, self._loader, self._pool, self._graphs = trainer, loader, pool, graphs
        self._block_bytes = cache.block_bytes
        self._fixed = {
            "weights": self._bytes(model.tensors()),
            "kv_cache": self._bytes(cache.cells),
        }

    def by_holder(self) -> dict[str, int]:
        """Bytes on the device; no tensor belongs to two holders."""
        sweeps, jobs = self._trainer.sweeps.values(), list(self._trainer.jobs)
        lent = self._trainer.live.blocks * self._block_bytes  # of the cache's blocks; the pool's are, too
        steps = [job.step for job in jobs if job.step is not None]
        held = {
            **self._fixed,
            "kv_cache": self._fixed["kv_cache"] - lent - self._pool.bytes_used,
            "adapter_pool": self._pool.bytes_used,
            "activations": lent + self._bytes(tensor for sweep in sweeps for tensor in _beside_blocks(sweep)),
            "gradients": self._bytes(tensor for step in steps for pair in step.grads.values() for tensor in pair),
            "training_state": sum(job.job.held_bytes for job in jobs if job.job is not None),
        }
        if self._graphs is not None:
            held["decode_graphs"] = self._graphs.held_bytes()
        return held

    def gauges(self) -> dict[str, float]:
        """Series of /metrics; those of the allocator on CUDA only."""
        gauges: dict[str, float] = {
            f'coserve_device_bytes{{holder="{holder}"}}': size for holder, size in self.by_holder().items()
        }
        gauges["coserve_adapter_cache_bytes"] = self._loader.cached_bytes
        if self._device.type == "cuda":
            gauges['coserve_allocator_bytes{kind="allocated"}'] = torch.cuda.memory_allocated(self._device)
            gauges['coserve_allocator_bytes{kind="reserved"}'] = torch.cuda.memory_reserved(self._device)
        return gauges

    def _bytes(self, tensors: Iterable[Tensor | None]) -> int:
        return storage_bytes(tensors, self._device)


def _beside_blocks(sweep: Sweep) -> Iterator[Tensor | None]:
    """What a sweep keeps outside of its blocks, between its units."""
    yield from (sweep.ids, sweep.positions)
    yield from sweep.working_set()
