"""Carries out a plan: one packed forward over decodes, prompt chunks and rides, then the training units.

It may assume that the plan fits the books (blocks, windows, residency). It never decides what runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Plan, Unit
from coserve.server.engine.adapters import AdapterBook
from coserve.server.engine.backward import run_backward_unit
from coserve.server.engine.forward import PackedPass, SweepPart, finish_window, run_packed, run_sweep_layers
from coserve.server.engine.generation import GenerationPart, RowRun
from coserve.server.engine.head import run_head_unit
from coserve.server.engine.iterations import Work
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.model import BaseModel
from coserve.server.engine.requests import Request, RequestBook
from coserve.server.engine.sampler import Sampled, sample, token_logprobs
from coserve.server.engine.sweep import Sweep
from coserve.server.wire.messages import TokenLogprob

_LOGIT_ROWS = 64  # logit rows at a time: a row of a 262k vocabulary is a megabyte


@dataclass(slots=True)
class Outcome:
    """What an iteration brought."""

    sampled: list[tuple[Request, Sampled]] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    parts: dict[int | str, float] = field(default_factory=dict)  # seconds: "forward", and by index in plan.units


class Runner:
    """Runs plans on one model and cache."""

    def __init__(self, model: BaseModel, cache: KVCache, requests: RequestBook, adapters: AdapterBook) -> None:
        self.model, self._cache = model, cache
        self._requests, self._adapters = requests, adapters

    def run(self, plan: Plan, sweeps: Mapping[int, Sweep]) -> Outcome:
        """Requests of the plan must be admitted (hold `SequenceBlocks`); what ran is committed to them."""
        outcome = Outcome()
        began = time.perf_counter()
        self._forward(plan, sweeps, outcome)
        for index, unit in enumerate(plan.units):
            ended = self._clock()
            outcome.parts["forward" if index == 0 else index - 1] = ended - began
            began = ended
            self._unit(unit, sweeps[unit.sweep_id], outcome.work)
        outcome.parts[len(plan.units) - 1 if plan.units else "forward"] = self._clock() - began
        if not (plan.decodes or plan.prefills or plan.rides):
            outcome.parts.pop("forward", None)
        return outcome

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    # ------------------------------------------------------------------ the packed forward

    def _forward(self, plan: Plan, sweeps: Mapping[int, Sweep], outcome: Outcome) -> None:
        scheduled = self._scheduled(plan)
        rides = [(sweeps[ride.sweep_id], ride.tokens) for ride in plan.rides]
        if not scheduled and not rides:
            return
        runs = [self._row_run(request, rows) for request, rows in scheduled]
        generation = GenerationPart(runs, self._cache)
        parts = [SweepPart(s, s.forward_rows, s.forward_rows + rows) for s, rows in rides]
        ids = [torch.tensor(self._token_ids(scheduled), dtype=torch.int64, device=self.model.device)]
        ids += [part.sweep.ids[part.start : part.end] for part in parts]
        positions = [generation.positions] + [part.sweep.positions[part.start : part.end] for part in parts]
        packed = PackedPass([generation, *parts])
        hidden = run_packed(self.model, torch.cat(ids), torch.cat(positions), packed)
        row = generation.rows
        for part in parts:
            finish_window(part.sweep, hidden[row : row + part.rows])
            row += part.rows
            outcome.work.train_forward += part.rows
            outcome.work.adapters.update(f"job:{step.job_id}" for step in part.sweep.steps)
        self._deliver_rows(scheduled, hidden[: generation.rows], outcome)

    def _scheduled(self, plan: Plan) -> list[tuple[Request, int]]:
        """(request, rows), neighbours by adapter."""
        wanted = [(request_id, 1) for request_id in plan.decodes] + [(p.request_id, p.tokens) for p in plan.prefills]
        found = []
        for request_id, rows in wanted:
            request = self._requests.get(request_id)
            if request is None or request.blocks is None:
                raise RuntimeError(f"the plan names {request_id}, which is not running")
            # A prefix hit at admission may have left less to run than was planned.
            found.append((request, min(rows, len(request.tokens) - request.computed)))
        return sorted(found, key=lambda item: item[0].version)

    def _row_run(self, request: Request, rows: int) -> RowRun:
        if request.blocks is None:
            raise RuntimeError(f"{request.id} has no blocks")
        self._requests.blocks.grow(request.blocks, rows)
        adapter = request.message.adapter
        pair = None if adapter is None else self._adapters.handle(adapter).pair
        return RowRun(rows, request.computed + rows, request.blocks.blocks, pair)

    @staticmethod
    def _token_ids(scheduled: list[tuple[Request, int]]) -> list[int]:
        return [t for request, rows in scheduled for t in request.tokens[request.computed : request.computed + rows]]

    def _deliver_rows(self, scheduled: list[tuple[Request, int]], hidden: Tensor, outcome: Outcome) -> None:
        """hidden [rows, H] of the generation rows: count them, sample where a sequence has run all its tokens."""
        row, ends, complete = 0, [], []
        for request, rows in scheduled:
            kind = "decode" if request.output and len(request.tokens) - request.computed == 1 else "prefill"
            setattr(outcome.work, kind, getattr(outcome.work, kind) + rows)
            if request.version:
                outcome.work.adapters.add(request.version)
            if request.wants_prompt_logprobs:
                self._prompt_logprobs(request, hidden[row : row + rows])
            self._requests.commit(request, rows)
            row += rows
            if request.computed == len(request.tokens):
                ends.append(row - 1)
                complete.append(request)
        for start in range(0, len(ends), _LOGIT_ROWS):
            chunk = slice(start, start + _LOGIT_ROWS)
            sampled = sample(self.model.logits(hidden[ends[chunk]]), [r.row for r in complete[chunk]])
            outcome.sampled += zip(complete[chunk], sampled, strict=True)

    def _prompt_logprobs(self, request: Request, hidden: Tensor) -> None:
        """hidden [rows, H] of a prompt chunk: row i predicts the token after it."""
        first = request.computed
        if first == 0:
            request.prompt_logprobs.append(None)
        following = list(request.message.prompt_ids[first + 1 : first + 1 + hidden.shape[0]])
        top = request.message.sampling.prompt_logprobs or 0
        for start in range(0, len(following), _LOGIT_ROWS):
            targets = following[start : start + _LOGIT_ROWS]
            logits = self.model.logits(hidden[start : start + len(targets)])
            for entry in token_logprobs(logits, targets, top):
                request.prompt_logprobs.append(TokenLogprob(entry.token_id, float(entry.logprob or 0.0), entry.top))

    # ------------------------------------------------------------------ training units

    def _unit(self, unit: Unit, sweep: Sweep, work: Work) -> None:
        work.units += 1
        if sweep.done:
            return
        work.adapters.update(f"job:{step.job_id}" for step in sweep.steps)
        if isinstance(unit, HeadUnit):
            before = sweep.head_rows
            run_head_unit(self.model, sweep, unit.rows, unit.steps)
            work.head += sweep.head_rows - before
        elif isinstance(unit, BackwardUnit):
            rows = min(unit.tokens, sweep.undone)
            run_backward_unit(self.model, sweep, unit.tokens)
            work.train_backward += rows / sweep.layers
        elif isinstance(unit, ForwardUnit):
            rows, first = sweep.partial_rows or unit.tokens, sweep.partial_layer
            run_sweep_layers(self.model, sweep, unit.tokens, unit.layers)
            work.train_forward += rows * min(unit.layers, sweep.layers - first) / sweep.layers
