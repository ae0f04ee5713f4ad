"""What an engine works on, as the gateway would write it: jobs with their tokens, adapters as PEFT folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from coserve.server.engine.load import LoadedModel
from coserve.server.training.peft.folder import write_folder
from coserve.server.training.peft.lora import LoraConfig, init_lora

ALPHA_OVER_RANK = 2.0

_TRAINING: dict[str, Any] = {
    "learning_rate": 1e-4, "lr_scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "betas": [0.9, 0.999], "eps": 1e-8, "gradient_accumulation_steps": 1, "n_epochs": 1000, "max_steps": None,
    "shuffle": False, "eval_every": None, "early_stopping_patience": None, "checkpoint_every": 10**6,
    "keep_checkpoints": 1, "publish_every": None, "priority": "normal",
}  # fmt: skip


def write_job(
    data_dir: Path, job_id: str, base_digest: str, rows: np.ndarray, *, rank: int, batch: int, init: str | None = None,
    **training: Any,
) -> None:  # fmt: skip
    """rows int [rows, length], every token bears a loss. `init` is a PEFT folder below the data directory."""
    folder = data_dir / "jobs" / job_id
    (folder / "tokens").mkdir(parents=True)
    count, length = rows.shape
    ids = np.ascontiguousarray(rows.reshape(-1), dtype=np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    save_file({"input_ids": ids, "labels": ids.copy(), "offsets": offsets}, folder / "tokens" / "train.safetensors")
    spec = {
        "job_id": job_id, "tenant": "bench", "seed": 0, "base_digest": base_digest,
        "adapter": {"type": "lora", "r": rank, "alpha": ALPHA_OVER_RANK * rank, "dropout": 0.0,
                    "target_modules": "all-linear", "init": init},
        "training": {**_TRAINING, "batch_size": batch, **training}, "has_validation": False,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))


def write_adapter(data_dir: Path, name: str, model: LoadedModel, rank: int, *, spread: float = 0.01) -> str:
    """A random adapter at every linear module, in the model's dtype; its path below the data directory."""
    config = LoraConfig(rank, ALPHA_OVER_RANK * rank)
    weights = init_lora(model.base.sites, config, seed=rank)
    generator = torch.Generator().manual_seed(rank)
    for pair in weights.values():
        pair.b = torch.randn(pair.b.shape, generator=generator) * spread
        pair.a, pair.b = pair.a.to(model.base.dtype), pair.b.to(model.base.dtype)
    folder = data_dir / "adapters" / name
    folder.mkdir(parents=True)
    write_folder(folder, config.with_names(model.base.sites), weights, "base", model.digest)
    return str(folder.relative_to(data_dir))
