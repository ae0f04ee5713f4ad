"""LoRA gradients two ways: PEFT with full-sequence autograd, and the engine's windows. For tests only."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from coserve.server.engine.activation_store import private_store
from coserve.server.engine.attention import ATTENTION_NAME, register
from coserve.server.engine.backward import run_backward_unit
from coserve.server.engine.forward import PackedPass, SweepPart, finish_window, run_packed, run_sweep_layers
from coserve.server.engine.head import run_head_unit
from coserve.server.engine.job_step import JobStep, TrainSequence
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep


@dataclass
class Row:
    input_ids: np.ndarray
    labels: np.ndarray


def random_rows(lengths: list[int], vocabulary: int, seed: int, labelled: float = 0.5) -> list[Row]:
    """Rows with labels on a random half of their tokens, at least one that counts."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = rng.integers(3, vocabulary, length)
        labels = np.where(rng.random(length) < labelled, ids, -100)
        labels[-1] = ids[-1]
        rows.append(Row(ids, labels))
    return rows


class PeftOracle:
    """A PEFT LoRA model; `attention` is "sdpa", or "eager" where the model has nothing else."""

    def __init__(self, architecture: str, dtype: torch.dtype, rank: int, seed: int, targets="all-linear") -> None:
        attention = "eager" if architecture == "gemma2" else "sdpa"
        base = tiny_model(architecture, dtype=dtype, attention=attention)
        self.model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).to(dtype)
        self.model.eval()
        self.scaling = 2.0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)

    def weights(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A [r, in], B as rank rows [r, out])."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, p in self.model.named_parameters():
            if "lora_" in name:
                module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
                found.setdefault(module, {})[rest[0]] = p
        return {module: (pair["A"], pair["B"].t()) for module, pair in found.items()}

    def gradients(self, rows: list[Row]) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Mean loss over the rows' label-bearing tokens, and its gradients."""
        self.model.zero_grad()
        count = sum(int((row.labels[1:] != -100).sum()) for row in rows)
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            logits = self.model(input_ids=torch.from_numpy(row.input_ids)[None], use_cache=False).logits[0, :-1]
            targets = torch.from_numpy(row.labels[1:])
            if bool((targets != -100).any()):
                loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
                loss.backward()
                total += loss.detach().double()
        names = {id(p): n for n, p in self.model.named_parameters()}
        del names
        pairs = {m: (a, b) for m, (a, b) in self.weights().items()}
        grads = {}
        for module, _ in pairs.items():
            layer = self.model.get_submodule("base_model.model." + module)
            ga, gb = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
            grads[module] = (ga.clone(), gb.t().clone())
        return float(total), grads


class HeldAdapter:
    """A training copy held in plain tensors."""

    def __init__(self, oracle: PeftOracle) -> None:
        self.pairs = {
            m: (a.detach().clone(), b.detach().clone().contiguous()) for m, (a, b) in oracle.weights().items()
        }
        self.scaling = oracle.scaling

    def pair(self, site):
        found = self.pairs.get(site.name)
        return None if found is None else (*found, self.scaling)


def engine_model(architecture: str, dtype: torch.dtype, *, backend=None, device: str = "cpu") -> BaseModel:
    register()
    model = tiny_model(architecture, dtype=dtype, attention="eager" if architecture == "gemma2" else "sdpa")
    model.config._attn_implementation = ATTENTION_NAME
    return BaseModel(copy.deepcopy(model).to(device), backend=backend)


def new_step(job_id: str, oracle: PeftOracle, rows: list[Row]) -> JobStep:
    count = sum(int((row.labels[1:] != -100).sum()) for row in rows)
    return JobStep(job_id, HeldAdapter(oracle), count)


def new_sweep(model: BaseModel, steps: dict[str, tuple[JobStep, list[Row]]], *, save: bool) -> Sweep:
    sequences = [
        TrainSequence(step, row.input_ids, row.labels, i) for step, rows in steps.values() for i, row in enumerate(rows)
    ]
    sweep = Sweep(sequences, layers=model.layer_count, dtype=model.dtype, device=model.device, save=save)
    sweep.place(private_store(model, sweep.rows, save))
    return sweep


def run_sweep(
    model: BaseModel, sweep: Sweep, forward: list[int], head: int, backward: list[int], layers: int | None = None
) -> None:
    """Forward windows and backward windows of the given sizes in turn, head units of `head` rows; with `layers`,
    windows go forward in layer-range units of that many layers."""
    turn = 0
    while not sweep.forward_done:
        window = min(forward[turn % len(forward)], sweep.rows - sweep.forward_rows)
        turn += 1
        if layers is None:
            end = sweep.forward_rows + window
            part = SweepPart(sweep, sweep.forward_rows, end, model.backend)
            rows = slice(sweep.forward_rows, end)
            finish_window(
                sweep, run_packed(model, sweep.ids[rows], sweep.positions[rows], PackedPass([part], model.backend))
            )
        else:
            target = sweep.forward_rows + window
            while sweep.forward_rows < target:
                run_sweep_layers(model, sweep, window, layers)
    while sweep.head_left:
        run_head_unit(model, sweep, head)
    turn = 0
    while not sweep.done:
        run_backward_unit(model, sweep, backward[turn % len(backward)])
        turn += 1


def worst_error(step: JobStep, reference: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest relative norm error over all gradient tensors."""
    if set(step.grads) != set(reference):
        raise AssertionError(f"gradients of other modules: {set(step.grads) ^ set(reference)}")
    errors = [
        float((got.double() - ref.double()).norm() / ref.double().norm())
        for name, pair in reference.items()
        for got, ref in zip(step.grads[name], pair, strict=True)
    ]
    return max(errors)
