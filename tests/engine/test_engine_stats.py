"""What the engine tells of itself reaches /metrics: how wrong the scheduler was, and who holds the memory."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from peft_oracle import prompt
from stepped_engine import SentMessages, SteppedEngine

from coserve.server.engine.iterations import IterationLog
from coserve.server.engine.stats import StatsClock
from coserve.server.telemetry.metrics import Metrics

torch.set_num_threads(1)


class Listened(SentMessages):
    """Somebody is there."""

    @property
    def connected(self) -> bool:
        return True


def test_errors_and_holders_are_exposed_as_they_are(tmp_path):
    engine = SteppedEngine(tmp_path)
    engine.submit("r", prompt(20, 1))
    engine.until(lambda: not len(engine.requests))
    scheduler, socket = engine.engine._scheduler, Listened(str(tmp_path / "s.sock"))
    clock = StatsClock(
        socket, engine.requests, engine.trainer, engine.pool, IterationLog(0), engine.holdings.gauges, scheduler
    )
    clock.send_if_due(engine.engine._outlook.now())
    (stats,) = socket.sent
    page = Metrics()
    page.observe(replace(stats, gauges={**stats.gauges, 'coserve_allocator_bytes{kind="reserved"}': 7.0}))
    lines = page.exposition()[0].decode()
    shown = {name: float(value) for name, value in re.findall(r"^(coserve_\S+) (\S+)$", lines, re.MULTILINE)}
    errors = scheduler.errors()
    assert errors.iterations > 0 and shown["coserve_prediction_error_median"] == errors.median > 0
    assert shown["coserve_prediction_over_share"] == errors.over
    assert shown["coserve_prediction_far_over_share"] == errors.far_over
    for holder, size in engine.holdings.by_holder().items():
        assert shown[f'coserve_device_bytes{{holder="{holder}"}}'] == size
    assert shown['coserve_allocator_bytes{kind="reserved"}'] == 7
    assert "# HELP coserve_device_bytes Bytes of the device by who holds them" in lines
