"""The heartbeat: what the engine tells of itself about once a second, also when it is idle.

It comes sooner where blocks were taken or given back, so that /metrics shows free memory as soon as it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from coserve.scheduler.policy import Scheduler
from coserve.scheduler.state import SchedulerState
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.iterations import IterationLog
from coserve.server.engine.job_forecasts import reports
from coserve.server.engine.requests import RequestBook
from coserve.server.engine.trainer import Trainer
from coserve.server.wire.messages import QueuedRequest, Stats
from coserve.server.wire.sync import EngineSocket

_EVERY_SECONDS = 1.0
_CHANGED_SECONDS = 0.2  # between two reports where the sequences or their blocks have changed
_LONG = 1.0  # seconds without blocks after which a job says so: most sweeps wait for an iteration


class StatsClock:
    """Sends Stats when they are due."""

    def __init__(
        self, socket: EngineSocket, requests: RequestBook, trainer: Trainer, pool: AdapterPool,
        iterations: IterationLog, more: Callable[[], dict[str, float]], scheduler: Scheduler,
    ) -> None:  # fmt: skip
        """`more`: gauges beside those that are told here."""
        self._scheduler = scheduler
        self._socket, self._requests, self._trainer = socket, requests, trainer
        self._pool, self._iterations, self._more = pool, iterations, more
        self._sent = -_EVERY_SECONDS
        self._told = (0, 0)

    def send_if_due(self, state: SchedulerState) -> None:
        """`state`: what the latest plan was made for."""
        now = time.monotonic()
        if now < self._sent + _CHANGED_SECONDS or not self._socket.connected:
            return
        holdings = (len(self._requests), self._requests.blocks.free_blocks)
        if holdings == self._told and now < self._sent + _EVERY_SECONDS:
            return
        self._sent, self._told = now, holdings
        itl, ttft = self._iterations.take_samples()
        queued = tuple(
            QueuedRequest(q.request_id, q.position, q.reason, q.wait_seconds) for q in self._scheduler.queue(state)
            if q.request_id in self._requests
        )  # fmt: skip
        forecasts = self._scheduler.forecast(self._trainer.works(), self._trainer.states())
        jobs = reports(forecasts, self._trainer.waits | self._waits_for_memory(state))
        self._socket.send(Stats(now, dict(self._iterations.counters), self._gauges(), itl, ttft, queued, jobs))

    def _waits_for_memory(self, state: SchedulerState) -> dict[str, str]:
        """Jobs of which nothing but a sweep without blocks is under way, and has been for some time; and why."""
        reasons = self._scheduler.sweep_waits(state)
        late = [s for s in state.sweeps if s.sweep_id in reasons and state.now - (s.unplaced_since or 0.0) > _LONG]
        at_work = {job.job_id for s in state.sweeps if s.placed for job in s.jobs}
        return {job.job_id: reasons[s.sweep_id] for s in late for job in s.jobs if job.job_id not in at_work}

    def _gauges(self) -> dict[str, float]:
        blocks, running = self._requests.blocks, self._requests.running
        errors = self._scheduler.errors()
        return {
            "coserve_requests_running": running,
            "coserve_requests_waiting": len(self._requests) - running,
            "coserve_kv_blocks_total": blocks.num_blocks,
            "coserve_kv_blocks_free": blocks.free_blocks,
            "coserve_prefix_cache_blocks": len(blocks.prefix_cache),
            "coserve_adapter_pool_bytes_total": self._pool.room.whole * self._pool.page_bytes,
            "coserve_adapter_pool_bytes_used": self._pool.bytes_used,
            "coserve_adapters_resident": len(self._pool.resident()),
            "coserve_jobs_running": len(self._trainer.job_ids),
            "coserve_training_sweeps": len(self._trainer.sweeps),
            "coserve_prediction_error_median": errors.median,
            "coserve_prediction_over_share": errors.over,
            "coserve_prediction_far_over_share": errors.far_over,
            **self._more(),
        }
