"""Job folders without a model: rows on disk, a few sites, and a synthetic gradient that depends on the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from coserve.server.training.dataset import IGNORED_LABEL
from coserve.server.training.job import TrainingJob
from coserve.server.training.peft.lora import LoraPair
from coserve.server.training.peft.sites import Site
from coserve.server.training.tensor_file import write_tensors

BASE_DIGEST = "b" * 64
SITES = tuple(
    Site(f"model.layers.{layer}.{name}", layer, size_in, size_out)
    for layer in range(2)
    for name, size_in, size_out in (("self_attn.q_proj", 12, 8), ("mlp.down_proj", 20, 12))
)
TRAINING = {
    "learning_rate": 1e-2, "lr_scheduler": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "max_grad_norm": 1.0,
    "betas": [0.9, 0.999], "eps": 1e-8, "batch_size": 2, "gradient_accumulation_steps": 1, "n_epochs": 3,
    "max_steps": None, "shuffle": True, "eval_every": None, "early_stopping_patience": None,
    "checkpoint_every": None, "keep_checkpoints": 3, "publish_every": None, "priority": "normal",
}  # fmt: skip
ADAPTER = {"type": "lora", "r": 3, "alpha": 6, "dropout": 0.0, "target_modules": "all-linear", "init": None}


def write_rows(path: Path, rows: list[list[int]], labels: list[list[int]] | None = None) -> None:
    labels = labels or [[IGNORED_LABEL, *row[1:]] for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(
        path,
        {
            "input_ids": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
            "labels": torch.tensor([label for row in labels for label in row], dtype=torch.int32),
            "offsets": torch.tensor(offsets, dtype=torch.int64),
        },
    )


def make_job(data_dir: Path, job_id: str = "ftjob-1", *, rows: int = 7, valid: int = 0, adapter: dict | None = None,
             **training: object) -> Path:  # fmt: skip
    """A complete job folder as the gateway leaves it; row i has i + 2 tokens."""
    folder = data_dir / "jobs" / job_id
    write_rows(folder / "tokens" / "train.safetensors", [list(range(1, i + 3)) for i in range(rows)])
    if valid:
        write_rows(folder / "tokens" / "valid.safetensors", [[5, 6, 7]] * valid)
    spec = {
        "job_id": job_id, "tenant": "acme", "seed": 7, "base_digest": BASE_DIGEST,
        "adapter": {**ADAPTER, **(adapter or {})}, "training": {**TRAINING, **training}, "has_validation": bool(valid),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def open_job(data_dir: Path, job_id: str = "ftjob-1", **options) -> TrainingJob:
    return TrainingJob.open(data_dir, job_id, SITES, BASE_DIGEST, "cpu", torch.float32, **options)


def synthetic_gradients(job: TrainingJob, batch) -> dict[str, LoraPair]:
    """Any function of weights, step and rows will do; this one moves every weight."""
    pull = sum(row.index + 1 for row in batch.rows) / 10
    return {
        name: LoraPair((pair.a * pull).cos() + batch.step / 50, (pair.b + pull).sin())
        for name, pair in job.params.items()
    }


def advance(job: TrainingJob, steps: int | None = None) -> None:
    """Answer the job's batches until it stops, or has done `steps` more optimizer steps."""
    target = None if steps is None else job.step + steps
    while (batch := job.next_batch()) is not None:
        if batch.kind == "eval":
            job.finish_eval(batch, 0.5 * batch.loss_tokens, 1)
            continue
        if target is not None and job.step >= target:
            return
        job.finish_train(batch, synthetic_gradients(job, batch), float(batch.loss_tokens), batch.loss_tokens // 2)


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
