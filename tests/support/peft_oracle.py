"""What PEFT, transformers and torch say: LoRA training loops, adapters on disk, greedy tokens. For tests only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

Row = tuple[list[int], list[int]]  # input ids and labels


def training_rows(count: int, seed: int = 5, longest: int = 40) -> list[Row]:
    """Rows of 3 … `longest` random tokens, labels on a random 60% of them and on the last."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(3, 500, int(rng.integers(3, longest)))
        labels = np.where(rng.random(len(ids)) < 0.6, ids, -100)
        labels[-1] = ids[-1]
        rows.append((ids.tolist(), labels.tolist()))
    return rows


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


def peft_loop(
    folder: Path, rows: list[Row], *, r: int, alpha: float, seed: int, step_rows: int, steps: int, lr: float = 1e-2,
    warmup: int = 2, weight_decay: float = 0.01,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """(initial, final) LoRA tensors under PEFT's names: torch's AdamW, cosine schedule, clipping at 1."""
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear")).eval()
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    initial = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=lr, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        batch = rows[step * step_rows : (step + 1) * step_rows]
        tokens = sum(sum(label != -100 for label in labels[1:]) for _, labels in batch)
        for ids, labels in batch:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return initial, {n: p.detach() for n, p in named.items()}


def distance(got: dict, initial: dict, reference: dict) -> float:
    """‖got − ref‖ / ‖ref − init‖ over all tensors together."""
    off = sum(float((got[n] - reference[n]).norm() ** 2) for n in reference) ** 0.5
    return off / sum(float((reference[n] - initial[n]).norm() ** 2) for n in reference) ** 0.5


def save_adapter(folder: Path, architecture: str, rank: int, seed: int, **config) -> Path:
    """A PEFT folder of a random adapter whose effect is large."""
    options = {"target_modules": "all-linear", **config}
    model = get_peft_model(tiny_model(architecture), LoraConfig(r=rank, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    return folder


def oracle_model(folder: Path, adapter: Path | None = None):
    base = AutoModelForCausalLM.from_pretrained(folder)
    return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()


def generate(model, ids: list[int], tokens: int) -> list[int]:
    """The greedy tokens of transformers' own loop, which nothing ends early."""
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def next_token_logits(model, ids: list[int], got: list[int]) -> torch.Tensor:
    """Logits [len(got), vocabulary], each after `ids` and the tokens of `got` before it, in one pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + got]), use_cache=False).logits[0]
    return logits[len(ids) - 1 : -1].float()


def assert_greedy_equal(model, ids: list[int], got: list[int]) -> None:
    """Equal to the oracle's greedy tokens, or its two best logits are within 1e-3 where they first differ."""
    best = next_token_logits(model, ids, got).topk(2)
    for position, (token, values, indices) in enumerate(zip(got, *best, strict=True)):
        if token != int(indices[0]):
            assert float(values[0] - values[1]) <= 1e-3, (position, token, values, indices)
            return
