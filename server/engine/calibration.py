"""The first seconds of an engine: it times a few iterations of its own, so that the latency model knows the machine.

The work is real (random tokens through the real runner), its results are thrown away. What is learned sets the
automatic promises on a CPU and keeps the first minute's iterations inside them.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from coserve.scheduler.policy import Scheduler
from coserve.scheduler.state import (
    BackwardUnit,
    ForwardUnit,
    HeadUnit,
    Plan,
    Prefill,
    RequestState,
    Ride,
    SchedulerState,
    SweepJob,
)
from coserve.server.engine.activation_store import private_store
from coserve.server.engine.adapter_pages import USUAL_RANK
from coserve.server.engine.head import head_steps
from coserve.server.engine.job_step import JobStep, TrainSequence
from coserve.server.engine.model import BaseModel
from coserve.server.engine.packing import sweep_state
from coserve.server.engine.pooled_adapter import PooledAdapter, pool_of
from coserve.server.engine.requests import Request, RequestBook
from coserve.server.engine.runner import YIELDED, Runner
from coserve.server.engine.shapes import layer_shapes
from coserve.server.engine.sweep import Sweep
from coserve.server.training.fault import OUT_OF_MEMORY
from coserve.server.training.peft.lora import LoraPair
from coserve.server.wire.messages import Generate, SamplingParams

_CONTEXT = 64
_DECODES = (1, 2, 4, 8, 16)
_STREAMS = 4  # the promise on a CPU is a multiple of the decode step at this many streams
_WINDOWS = (16, 64, 256)
_MOST_SECONDS = 8.0


def _throwaway_adapter(model: BaseModel) -> PooledAdapter:
    """Of usual size: at every site, of small random numbers."""
    weights = {
        site.name: LoraPair(
            torch.randn(USUAL_RANK, site.in_features) * 0.01, torch.randn(USUAL_RANK, site.out_features) * 0.01
        )
        for site in model.sites
    }
    return pool_of(model, [weights])[0]


class Calibration:
    """Runs once, before the engine is ready."""

    def __init__(
        self, model: BaseModel, runner: Runner, requests: RequestBook, max_model_len: int, usual_pages: int
    ) -> None:
        """`usual_pages`: of the engine's pool, that the adapter in training here would take."""
        self._model, self._runner, self._requests = model, runner, requests
        self._layers = layer_shapes(model)
        self._job = SweepJob("calibration", "", 1.0, "normal", adapter_pages=usual_pages)
        self._context = max(2, min(_CONTEXT, max_model_len - 16))
        self._rng = np.random.default_rng(0)
        self._adapter = _throwaway_adapter(model)
        self._observed: list[tuple[Plan, SchedulerState, float, dict[int | str, float]]] = []

    def measure(self, window: int) -> float:
        """Times a few iterations; returns the decode step's seconds at four streams."""
        began = time.monotonic()
        step = self._decodes()
        windows = sorted({min(w, window) for w in _WINDOWS})
        for rows in windows:
            if time.monotonic() - began < _MOST_SECONDS:
                self._prefill(min(rows, self._context))
                self._training(rows)
        self._requests.blocks.prefix_cache.clear()
        return step

    def teach(self, scheduler: Scheduler) -> None:
        for plan, state, seconds, parts in self._observed:
            scheduler.observe(plan, state, seconds, parts)

    def _decodes(self) -> float:
        """Iterations of 1 … 16 decode rows; the smaller of two runs each, the first of all thrown away."""
        four = 0.0
        requests = [self._request(i) for i in range(max(_DECODES))]
        needed = -(-(self._context + 3 * len(_DECODES)) // self._requests.blocks.block_size)
        possible = [n for n in _DECODES if n * needed <= self._requests.blocks.free_blocks] or [1]
        for request in requests[: possible[-1]]:
            self._requests.admit(request)
            self._run(Plan(prefills=(Prefill(request.id, len(request.tokens)),)), {}, teach=False)
        for count in possible:
            times = []
            for turn in range(3):
                seconds = self._run(Plan(decodes=tuple(r.id for r in requests[:count])), {}, teach=turn > 0)
                times.append(seconds)
            if count <= _STREAMS:
                four = min(times[1:])
        for request in requests:
            self._requests.remove(request)
        return four

    def _prefill(self, rows: int) -> None:
        request = self._request(1000 + rows, rows)
        self._requests.admit(request)
        self._run(Plan(prefills=(Prefill(request.id, rows),)), {})
        self._requests.remove(request)

    def _training(self, rows: int) -> None:
        """A window of a sweep: as a ride, then head units, and the backward of the two uppermost layers."""
        ids = self._rng.integers(3, self._model.vocab_size, rows)
        step = JobStep("calibration", self._adapter, max(rows - 1, 1))
        for ride in (True, False):
            sweep = Sweep([TrainSequence(step, ids, ids)], layers=self._model.layer_count, dtype=self._model.dtype,
                          device=self._model.device, save=True)  # fmt: skip
            sweep.place(private_store(self._model, rows, save=True, layers=self._layers))
            if ride:
                self._run(Plan(rides=(Ride(0, rows),)), {0: sweep})
                continue
            half = max(1, self._model.layer_count // 4)
            self._run(Plan(units=(ForwardUnit(0, rows, half),)), {0: sweep})
            self._run(Plan(units=(ForwardUnit(0, rows, self._model.layer_count),)), {0: sweep}, teach=False)
            steps = head_steps(self._model, True)
            for size, cuts in ((4, (steps,)), (16, (steps,)), (64, (steps // 4, steps // 2, steps))):
                for cut in cuts:
                    if sweep.head_left and cut:
                        self._run(Plan(units=(HeadUnit(0, size, cut),)), {0: sweep})
            while sweep.head_left:
                self._run(Plan(units=(HeadUnit(0, 64, steps),)), {0: sweep}, teach=False)
            for turn in range(min(3, self._model.layer_count)):
                self._run(Plan(units=(BackwardUnit(0, rows),)), {0: sweep}, teach=turn > 0)

    def _request(self, number: int, length: int | None = None) -> Request:
        ids = tuple(self._rng.integers(3, self._model.vocab_size, length or self._context).tolist())
        params = SamplingParams(max_tokens=3 * len(_DECODES) + 1, seed=0, temperature=0.0)
        name = f"calibration-{number}"
        self._requests.add(Generate(name, "", ids, params, None, f"calibration-{number}", time.monotonic()))
        request = self._requests.get(name)
        if request is None:
            raise RuntimeError("the request book did not take a calibration request")
        return request

    def _run(self, plan: Plan, sweeps: dict[int, Sweep], *, teach: bool = True) -> float:
        state = SchedulerState(
            now=0.0,
            requests=tuple(self._state(r) for r in self._requests),
            sweeps=tuple(sweep_state(i, s, self._model, s.rows, (self._job,)) for i, s in sweeps.items()),
            free_blocks=self._requests.blocks.free_blocks, block_size=self._requests.blocks.block_size,
            max_running=64, max_adapters=64,
        )  # fmt: skip
        clock = time.perf_counter()
        outcome = self._runner.run(plan, sweeps)
        seconds = time.perf_counter() - clock
        if outcome.disturbed:
            faults = [*outcome.failed.values(), *outcome.lost.values()]
            if all(fault.code in (OUT_OF_MEMORY, YIELDED.code) for fault in faults):
                raise MemoryError("the iterations that the engine times at its start do not fit in memory")
            raise RuntimeError(f"the iterations that the engine times at its start failed: {faults}")
        for request, sampled in outcome.sampled:
            self._requests.deliver(request, sampled, 0.0)
        if teach:
            self._observed.append((plan, state, seconds, outcome.parts))
        return seconds

    def _state(self, request: Request) -> RequestState:
        return self._requests.state(request, 1.0, True)
