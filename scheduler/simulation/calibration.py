"""The iterations that an engine times before it is ready, on the simulated card: a new policy's first lesson."""

from __future__ import annotations

from coserve.scheduler.simulation.cards import Card
from coserve.scheduler.simulation.device import Device
from coserve.scheduler.simulation.policies import Policy
from coserve.scheduler.simulation.streams import Stream, Sweep
from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Plan, Prefill, Ride, SweepJob

_CONTEXT = 64
_WINDOWS = (16, 64, 256)


def calibrate(policy: Policy, card: Card, window: int, seed: int = 0) -> None:
    """Teach `policy` decode steps of 1 to 16 rows, prompts, and windows of training up to `window` rows."""
    device = Device(card, blocks=4096, seed=seed)
    for count in (1, 2, 4, 8, 16):
        device.streams = [Stream(f"s{i}", 0.0, _CONTEXT, 99) for i in range(count)]
        for stream in device.streams:
            device.run(Plan(prefills=(Prefill(stream.name, _CONTEXT),)))
        for _ in range(2):
            _observe(policy, device, Plan(decodes=tuple(s.name for s in device.streams)))
    for rows in sorted({min(w, window) for w in _WINDOWS}):
        device.streams, device.sweeps = [Stream("p", 0.0, min(rows, _CONTEXT), 1)], []
        _observe(policy, device, Plan(prefills=(Prefill("p", min(rows, _CONTEXT)),)))
        _window(policy, device, rows)


def _window(policy: Policy, device: Device, rows: int) -> None:
    layers, steps = device.card.layers, device.card.head_steps
    for ride in (True, False):
        job = SweepJob("calibration", "", 1.0, "normal", adapter_pages=1)
        sweep = Sweep(0, rows, rows - 1, layers=layers, window=rows, head_steps=steps, jobs=(job,))
        device.sweeps = [sweep]
        if ride:
            _observe(policy, device, Plan(rides=(Ride(0, rows),)))
            continue
        half = max(1, layers // 4)
        _observe(policy, device, Plan(units=(ForwardUnit(0, rows, half),)))
        if half < layers:
            device.run(Plan(units=(ForwardUnit(0, rows, layers - half),)))
        for size, cuts in ((4, (steps,)), (16, (steps,)), (64, (steps // 4, steps // 2, steps))):
            for cut in cuts:
                if sweep.batch or sweep.ready:
                    batch = sweep.batch or min(size, sweep.ready)
                    _observe(policy, device, Plan(units=(HeadUnit(0, batch, min(cut, steps - sweep.batch_steps)),)))
        while sweep.headed < sweep.all_labels:
            batch = sweep.batch or min(64, sweep.ready)
            device.run(Plan(units=(HeadUnit(0, batch, steps - sweep.batch_steps),)))
        for turn in range(min(3, layers)):
            plan = Plan(units=(BackwardUnit(0, rows),))
            _observe(policy, device, plan) if turn else device.run(plan)


def _observe(policy: Policy, device: Device, plan: Plan) -> None:
    state = device.state()
    seconds, parts = device.run(plan)
    policy.observe(plan, state, seconds, parts)
