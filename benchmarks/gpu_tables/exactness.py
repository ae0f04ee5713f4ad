"""Exactness: gradients and greedy tokens of a small model on the device, against the same weights in float64.

The engine is driven as for any tenant: a job of one step, requests with and without an adapter. The oracle is
transformers with PEFT in float64, sdpa attention, full-sequence autograd, on the weights as the engine's dtype rounds
them. A step's gradient g is read off the checkpoint: with eps = 1 and no decay AdamW's first step moves a weight by
u = g / (|g| + 1) times the learning rate, so g = u / (1 - |u|).

Errors are norms relative to the oracle's; PEFT's own, in the same dtype, stands beside ours. A greedy token is as wrong
as its logit falls short of the oracle's best one, relative to the row's largest logit; the oracle is given the engine's
own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import say

from coserve.server.engine.load import LoadedModel
from coserve.server.training.peft.folder import read_folder
from coserve.server.training.peft.lora import LoraWeights
from coserve.server.wire.messages import AdapterRef
from gpu_tables.bench import Bench
from gpu_tables.geometry import SMALL, loaded_model, random_model
from gpu_tables.orders import write_adapter, write_job
from gpu_tables.stand import Stand
from gpu_tables.table import Table

RANK = 16
RATE = 1000.0
SPREAD = 0.0625  # of the weights: the outputs are not flat
Gradients = dict[str, tuple[torch.Tensor, torch.Tensor]]  # site name -> dA [r, in], dB [r, out]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class Size:
    rows: int
    length: int
    window: int
    prompts: int
    prompt: int
    new_tokens: int


FULL = Size(4, 600, 256, 8, 300, 64)
TOY = Size(2, 48, 32, 2, 20, 8)


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    table = bench.table("exactness", "Exactness: relative errors against float64", ["dtype", "what", "error", "worst"])
    table.title = "Exactness: relative errors against float64 (a model of 4 layers, hidden size 256)"
    for dtype in BOUNDS:
        name = str(dtype).removeprefix("torch.")
        for policy in ("save", "recompute"):
            if (
                bench.attempt(table, f"{name}, {policy}", partial(_errors_of, bench, size, table, dtype, policy))
                is None
            ):
                table.lack(name, f"gradients and tokens, {policy}")
                table.aim(f"{name}, {policy}", None, BOUNDS[dtype], ran_out=True)
    table.finish()


def _errors_of(bench: Bench, size: Size, table: Table, dtype: torch.dtype, policy: str) -> bool:
    """The rows of one dtype and policy; requests decode under one of the policies only. True at its end."""
    name, bound = str(dtype).removeprefix("torch."), BOUNDS[dtype]
    model = loaded_model(SMALL, dtype, bench.device, kernels=bench.kernels, spread=SPREAD)
    with bench.stand(
        model, activations=policy, train_window=size.window, kv_memory=64 << 20, adapter_memory=16 << 20,
        activation_memory=2 << 30, max_model_len=2048,
    ) as stand:  # fmt: skip
        init = write_adapter(stand.data_dir, "init", model, RANK, spread=0.05)
        oracle = Oracle(bench.device, dtype, stand.data_dir / init, torch.float64)
        rows = _rows(size)
        expected = oracle.gradients(rows)
        if policy == "save":
            peer = Oracle(bench.device, dtype, stand.data_dir / init, dtype).gradients(rows)
            error, worst = _errors(peer, expected)
            table.row(name, "gradients, PEFT in this dtype", _short(error), f"{_short(worst)} (a tensor)")
        error, worst = _errors(_gradients(stand, model, rows, init), expected)
        say(f"{name}, gradients, {policy}: {error:.1e}")
        table.row(name, f"gradients, {policy}", _short(error), f"{_short(worst)} (a tensor)")
        table.aim(f"{name}, gradients, {policy}", error, bound)
        if policy == "recompute":
            return True
        for label, adapter in (("base", None), ("adapter", AdapterRef(f"{1:064x}", init))):
            gap, equal = _tokens(stand, oracle, size, adapter)
            say(f"{name}, tokens, {label}: {gap:.1e}")
            table.row(name, f"greedy tokens, {label}", _short(gap), f"{100 * equal:.1f}% of tokens equal")
            table.aim(f"{name}, greedy tokens, {label}", gap, bound)
    return True


class Oracle:
    """transformers and PEFT in the dtype `runs_in`, on weights as `dtype` rounds them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, adapter: Path, runs_in: torch.dtype) -> None:
        from peft import PeftModel

        base = random_model(SMALL, dtype, device, spread=SPREAD).to(runs_in)
        self._model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True).to(runs_in).eval()
        self._device = device

    def gradients(self, rows: torch.Tensor) -> Gradients:
        """rows int64 [rows, length] -> those of the mean loss."""
        rows = rows.to(self._device)
        self._model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                site, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
                found.setdefault(site, {})[rest[0]] = parameter.grad
        return {site: (pair["A"].cpu(), pair["B"].t().cpu()) for site, pair in found.items()}

    @torch.no_grad()
    def logits(self, ids: Sequence[int], *, adapter: bool) -> torch.Tensor:
        """[tokens, vocabulary]"""
        tokens = torch.tensor([list(ids)], device=self._device)
        if adapter:
            return self._model(input_ids=tokens, use_cache=False).logits[0]
        with self._model.disable_adapter():
            return self._model(input_ids=tokens, use_cache=False).logits[0]


def _rows(size: Size) -> torch.Tensor:
    return torch.randint(3, SMALL.vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(1))


def _gradients(stand: Stand, model: LoadedModel, rows: torch.Tensor, init: str) -> Gradients:
    """Of a job's only step."""
    write_job(
        stand.data_dir, "one-step", model.digest, rows.numpy(), rank=RANK, batch=len(rows), init=init, max_steps=1,
        learning_rate=RATE, eps=1.0, max_grad_norm=None,
    )  # fmt: skip
    stand.start_job("one-step")
    stand.until(lambda: bool(stand.events("one-step", "finished")))
    (finished,) = stand.events("one-step", "finished")
    before = read_folder(stand.data_dir / init, model.base.sites)[1]
    return _undone(before, read_folder(stand.data_dir / finished["data"]["path"], model.base.sites)[1])


def _errors(found: Gradients, expected: Gradients) -> tuple[float, float]:
    """(of all gradients together, of the worst tensor)"""
    wrong = whole = worst = 0.0
    for site, pair in found.items():
        for got, right in zip(pair, expected[site], strict=True):
            off, norm = float((got.double() - right).norm()), float(right.norm())
            wrong, whole, worst = wrong + off**2, whole + norm**2, max(worst, off / norm)
    return (wrong / whole) ** 0.5, worst


def _undone(before: LoraWeights, after: LoraWeights) -> Gradients:
    """The gradients that took the weights from `before` to `after`, float64."""
    found = {}
    for site in before:
        pair = []
        for old, new in ((before[site].a, after[site].a), (before[site].b, after[site].b)):
            moved = (old.double() - new.double()) / RATE
            pair.append(moved / (1.0 - moved.abs()))
        found[site] = (pair[0], pair[1])
    return found


def _tokens(stand: Stand, oracle: Oracle, size: Size, adapter: AdapterRef | None) -> tuple[float, float]:
    """(worst shortfall of a token, share of tokens that are the oracle's)"""
    prompts = stand.prompts(size.prompts, size.prompt)
    requests = stand.generate(prompts, size.new_tokens, [adapter] * size.prompts)
    stand.until(lambda: all(stand.tokens[request] == size.new_tokens for request in requests))
    worst, equal = 0.0, 0
    for prompt, request in zip(prompts, requests, strict=True):
        told = stand.texts[request]
        logits = oracle.logits([*prompt, *told], adapter=adapter is not None)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(told, device=logits.device)[:, None])[:, 0]
        gaps = (logits.amax(1) - chosen) / logits.abs().amax(1)
        worst, equal = max(worst, float(gaps.max())), equal + int((gaps == 0).sum())
    return worst, equal / (size.prompts * size.new_tokens)


def _short(error: float) -> str:
    return f"{error:.1e}"
