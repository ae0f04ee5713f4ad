"""What is said of the device's memory is what the storages behind the tensors take: to the byte, and all of them."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from engine_process import write_job
from gradient_oracle import engine_model
from peft_oracle import training_rows
from stepped_engine import DIGEST, SteppedEngine
from torch import Tensor

from coserve.server.engine.job_step import JobStep
from coserve.server.engine.kv_cache import KVCache, block_bytes
from coserve.server.engine.shapes import layer_shapes
from coserve.server.wire.messages import StartJob, TenantShare

torch.set_num_threads(1)


def taken(tensors: Iterable[Tensor]) -> int:
    """By the storages, each once; those that oneDNN has packed know their own size."""
    sizes = {}
    for t in tensors:
        packed = t.is_mkldnn
        at = torch.ops.mkldnn.data_ptr(t) if packed else t.untyped_storage().data_ptr()
        sizes[at] = torch.ops.mkldnn._nbytes(t) if packed else t.untyped_storage().nbytes()
    return sum(sizes.values())


def alive() -> list[Tensor]:
    """All tensors that Python knows."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type == "cpu"]


def within(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object; a job's step, the cache, and what they lead to, are others'."""
    if id(thing) in seen or isinstance(thing, (JobStep, KVCache, type, str)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    parts = list(thing.values()) if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else []
    names = [*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())]
    for part in [*parts, *(getattr(thing, name) for name in names)]:
        yield from within(part, seen)


def test_no_byte_of_an_engine_is_without_a_holder(tmp_path):
    engine_model("llama", torch.float32)  # made once and copied from then on
    before = alive()  # held, so that no address is used twice
    engine = SteppedEngine(tmp_path, blocks=10, pool_bytes=100_000)
    held = engine.holdings.by_holder()
    known = {id(t) for t in before}
    new = taken(t for t in alive() if id(t) not in known)
    assert 0 <= new - sum(held.values()) < 2048, "the last layer call's rows at most"
    block = block_bytes(layer_shapes(engine.model), 16, torch.float32)
    assert held["kv_cache"] == (10 + 100_000 // block) * block
    assert held["adapter_pool"] == 0, "it has no memory of its own"
    assert held["activations"] == held["gradients"] == held["training_state"] == 0
    series = engine.holdings.gauges()
    assert series['coserve_device_bytes{holder="weights"}'] == held["weights"]
    assert series["coserve_adapter_cache_bytes"] == 0


def test_a_jobs_masters_moments_gradients_and_activations(tmp_path):
    engine = SteppedEngine(tmp_path, itl=1e-4, activations="save")
    write_job(tmp_path, "j", DIGEST, training_rows(16), r=4)
    engine.intake._start_job(StartJob("j", "t", TenantShare()))
    largest = 0

    def halfway() -> bool:
        """Through the forward, and some layers' backward."""
        nonlocal largest
        sweeps = list(engine.trainer.sweeps.values())
        stored = engine.holdings.by_holder()["activations"]
        assert stored == engine.trainer.live.blocks * engine.cache.block_bytes + taken(within(sweeps, set()))
        largest = max(largest, stored)
        return any(sweep.dy is not None and sweep.layer == 0 for sweep in sweeps)

    engine.until(halfway)
    (running,) = engine.trainer.jobs
    held = engine.holdings.by_holder()
    masters = [t for pair in running.job.params.values() for t in (pair.a, pair.b)]
    assert held["training_state"] == taken(masters) == sum(4 * t.numel() for t in masters)
    assert held["gradients"] == taken(t for pair in running.step.grads.values() for t in pair) > 0
    assert 0 < held["activations"] <= largest
    lent = engine.trainer.live.blocks * engine.cache.block_bytes
    assert held["adapter_pool"] == engine.pool.bytes_used >= taken(masters)
    assert held["kv_cache"] + lent + held["adapter_pool"] == taken(engine.cache.cells)
    engine.until(lambda: running.job.step == 1)
    a_count = 4  # of its steps, which torch keeps with each parameter
    assert engine.holdings.by_holder()["training_state"] == 3 * taken(masters) + a_count * len(masters)
    engine.until(lambda: not engine.trainer.job_ids)
    held = engine.holdings.by_holder()
    assert held["activations"] == held["gradients"] == held["training_state"] == 0
