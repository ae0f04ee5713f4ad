"""Which jobs share a sweep."""

from __future__ import annotations

import torch
from gradient_oracle import engine_model
from training_jobs import make_job, open_job

from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.live_sweeps import LiveSweeps
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.running_job import RunningJob
from coserve.server.engine.shapes import layer_shapes


def test_jobs_of_two_priorities_share_no_sweep(tmp_path):
    """Else the low one's rows would go with the normal one's, before those of other tenants' normal jobs."""
    model = engine_model("llama", torch.float32)
    cache = KVCache(layer_shapes(model), 64, 16, torch.float32)
    options = EngineOptions("base", tmp_path, "", device="cpu")
    live = LiveSweeps(model, options, BlockManager(64, 16), cache, 64)
    pool = AdapterPool.of(2**20, 512, torch.float32)

    def due(name: str, priority: str) -> RunningJob:
        make_job(tmp_path, name, priority=priority)
        running = RunningJob(name, job=open_job(tmp_path, name))
        running.begin(pool, running.job.next_batch(), live.most_rows)
        return running

    jobs = [due("a", "normal"), due("low1", "low"), due("b", "normal"), due("low2", "low")]
    assert [running.job_id for running in live.group(jobs)] == ["a", "b"]
    assert [running.job_id for running in live.group(jobs[1:])] == ["low1", "low2"]
