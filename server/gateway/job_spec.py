"""What a finetuning job is, from the tenant's request to the spec that the engine reads: defaults and arithmetic.

Pure functions over plain JSON values; the request has been validated, nothing here touches a disk or a database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coserve.server.store.jobs import Job

DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
DEFAULT_LEARNING_RATE = 2e-4
AUTO = "auto"

ADAPTER_DEFAULTS: dict[str, Any] = {
    "type": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear", "init": "default",
}  # fmt: skip
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": None, "lr_scheduler": "cosine", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "optimizer": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "max_steps": None, "max_length": None, "shuffle": True,
    "gradient_accumulation_steps": 1, "loss_on": "assistant", "eval_every": None, "early_stopping_patience": None,
    "checkpoint_every": None, "keep_checkpoints": 3, "publish_every": None, "priority": "normal",
}  # fmt: skip
_SPEC_TRAINING = (
    "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm", "betas", "eps", "gradient_accumulation_steps",
    "max_steps", "shuffle", "eval_every", "early_stopping_patience", "checkpoint_every", "keep_checkpoints",
    "publish_every", "priority",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A validated request to create a job; the three mappings hold only what the client gave."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def full_hyperparameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """All three keys, `auto` where nothing was said."""
    return {name: given.get(name, AUTO) for name in ("batch_size", "learning_rate_multiplier", "n_epochs")}


def supervised(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """A job's `method`, which repeats its hyperparameters."""
    return {"type": "supervised", "supervised": {"hyperparameters": dict(hyperparameters)}}


def resolved_hyperparameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that `auto` stands for."""
    values = full_hyperparameters(given)
    numbers = {"batch_size": DEFAULT_BATCH_SIZE, "learning_rate_multiplier": 1.0, "n_epochs": DEFAULT_EPOCHS}
    return {name: numbers[name] if value == AUTO else value for name, value in values.items()}


def full_training(given: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Every training field; the learning rate is the one given, or the default times the multiplier."""
    training = {**TRAINING_DEFAULTS, **given}
    if training["learning_rate"] is None:
        multiplier = resolved_hyperparameters(hyperparameters)["learning_rate_multiplier"]
        training["learning_rate"] = DEFAULT_LEARNING_RATE * multiplier
    return training


def full_adapter(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**ADAPTER_DEFAULTS, **given}


def fine_tuned_model_id(base: str, organization: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<organization>:<suffix>:<id>`; the suffix may be empty."""
    return f"ft:{base}:{organization}:{suffix or ''}:{job_id.removeprefix('ftjob-')}"


def checkpoint_model_id(fine_tuned_model: str, step: int) -> str:
    return f"{fine_tuned_model}:ckpt-step-{step}"


def total_steps(rows: int, hyperparameters: Mapping[str, Any], training: Mapping[str, Any]) -> int:
    """Optimizer steps of a job over `rows` examples: epochs x ceil(rows / step size), at most max_steps."""
    numbers = resolved_hyperparameters(hyperparameters)
    per_step = numbers["batch_size"] * training["gradient_accumulation_steps"]
    steps = numbers["n_epochs"] * math.ceil(rows / per_step)
    return steps if training["max_steps"] is None else min(steps, training["max_steps"])


def engine_spec(job: Job, base_digest: str, *, has_validation: bool, init: str | None) -> dict[str, Any]:
    """What jobs/<id>/spec.json holds. `init` is the folder to start from, relative to the data directory."""
    numbers = resolved_hyperparameters(job.hyperparameters)
    adapter = {name: job.adapter[name] for name in ("type", "r", "alpha", "dropout", "target_modules")}
    if init is not None:  # its own config decides; a pattern there would be no list of names here
        adapter["target_modules"] = "all-linear"
    return {
        "job_id": job.id,
        "tenant": job.tenant,
        "seed": job.seed,
        "base_digest": base_digest,
        "adapter": {**adapter, "init": init},
        "training": {
            "learning_rate": job.training["learning_rate"],
            **{name: job.training[name] for name in _SPEC_TRAINING},
            "batch_size": numbers["batch_size"],
            "n_epochs": numbers["n_epochs"],
        },
        "has_validation": has_validation,
    }
