"""The wire models of finetuning jobs: what a create request may say, and the objects that answer.

Requests are strict: an unknown key or a value of another type is refused by name, for a typo must not train.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coserve.server.api.errors import invalid, unsupported
from coserve.server.gateway.job_spec import ADAPTER_DEFAULTS, JobRequest
from coserve.server.store.checkpoints import Checkpoint
from coserve.server.store.job_events import Event
from coserve.server.store.jobs import Job

MAX_RANK = 1024
_PROGRESS = ("step", "total_steps", "tokens_per_second", "loss", "queue_position", "eta_seconds", "reason",
             "expected_wait_seconds", "expected_tokens_per_second")  # fmt: skip
_METRICS = (
    "step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy", "full_valid_loss",
    "full_valid_mean_token_accuracy",
)  # fmt: skip

Auto = Literal["auto"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
ModuleNames = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], Field(fail_fast=True, min_length=1, max_length=256)
]
FileId = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(_Strict):
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = "auto"
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"


class Supervised(_Strict):
    hyperparameters: Hyperparameters | None = None


class Method(_Strict):
    type: str = Field(max_length=64)
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


class AdapterOptions(_Strict):
    type: str = Field(default="lora", max_length=64)
    r: int = Field(default=16, ge=1, le=MAX_RANK)
    alpha: float = Field(default=32, gt=0, le=1e6, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, le=0.999999, allow_inf_nan=False)
    target_modules: Literal["all-linear"] | ModuleNames = "all-linear"
    init: str = Field(default="default", max_length=256)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_names(cls, value: Any) -> Any:
        if value != "all-linear" and not isinstance(value, list):
            raise ValueError('must be "all-linear" or a list of module names')
        return value

    @field_validator("init")
    @classmethod
    def _default_or_adapter(cls, value: str) -> str:
        if value != "default" and not (value.startswith("adapter:") and len(value) > len("adapter:")):
            raise ValueError('must be "default" or "adapter:<id>", an adapter to start from')
        return value


class TrainingOptions(_Strict):
    learning_rate: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)] | None = None
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0, le=2**31 - 1)
    weight_decay: float = Field(default=0.0, ge=0, le=1e3, allow_inf_nan=False)
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = 1.0
    optimizer: str = Field(default="adamw", max_length=64)
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=0.9999999, allow_inf_nan=False)]], Field(fail_fast=True)] = (
        Field(default=[0.9, 0.999], min_length=2, max_length=2)
    )
    eps: float = Field(default=1e-8, gt=0, le=1, allow_inf_nan=False)
    max_steps: Count | None = None
    max_length: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = None
    shuffle: bool = True
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=65536)
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    eval_every: Count | None = None
    early_stopping_patience: Count | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 3
    publish_every: Count | None = None
    priority: Literal["normal", "low"] = "normal"


class CreateJob(_Strict):
    model: str = Field(min_length=1, max_length=512)
    training_file: FileId
    validation_file: FileId | None = None
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    integrations: list[Any] | None = None
    adapter: AdapterOptions | None = None
    training: TrainingOptions | None = None

    def job_request(self) -> JobRequest:
        """The request without its wire form. Raises ApiError for what is well formed and yet not served, or absurd."""
        if self.suffix is not None and (
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.suffix) is None or ".." in self.suffix
        ):
            raise invalid(
                "Invalid value for 'suffix': use letters, digits, '.', '_' and '-', beginning with a letter or digit.",
                "suffix",
            )
        if self.integrations:
            raise unsupported("'integrations' are not supported by this server; leave them out.", "integrations")
        hyperparameters = self._hyperparameters()
        adapter = self.adapter.model_dump(exclude_unset=True) if self.adapter else {}
        if adapter.get("type", "lora") != "lora":
            raise unsupported("Only adapters of type 'lora' are supported.", "adapter.type")
        training = self.training.model_dump(exclude_unset=True) if self.training else {}
        self._check_training(training, hyperparameters)
        return JobRequest(
            self.model, self.training_file, self.validation_file, self.suffix, self.seed, self.metadata,
            hyperparameters, adapter, training,
        )  # fmt: skip

    def _hyperparameters(self) -> dict[str, Any]:
        if self.method is not None:
            if self.method.type in ("dpo", "reinforcement"):
                raise unsupported(f"The method '{self.method.type}' is not supported; use 'supervised'.", "method.type")
            if self.method.type != "supervised":
                raise invalid("Invalid value for 'method.type': it must be 'supervised'.", "method.type")
            for name in ("dpo", "reinforcement"):
                if getattr(self.method, name) is not None:
                    raise invalid(f"'method.{name}' does not go with the type 'supervised'.", f"method.{name}")
        inner = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        nested = inner.model_dump(exclude_unset=True) if inner else {}
        alias = self.hyperparameters.model_dump(exclude_unset=True) if self.hyperparameters else {}
        for name in nested.keys() & alias.keys():
            if nested[name] != alias[name]:
                raise invalid(
                    f"'hyperparameters.{name}' and 'method.supervised.hyperparameters.{name}' differ; give one.",
                    f"hyperparameters.{name}",
                )
        return {**alias, **nested}

    def _check_training(self, training: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
        if training.get("optimizer", "adamw") != "adamw":
            raise unsupported("Only the optimizer 'adamw' is supported.", "training.optimizer")
        if training.get("learning_rate") is not None and "learning_rate_multiplier" in hyperparameters:
            raise invalid(
                "'training.learning_rate' and 'learning_rate_multiplier' both set the learning rate; give one of them.",
                "training.learning_rate",
            )
        for name in ("eval_every", "early_stopping_patience"):
            if training.get(name) is not None and self.validation_file is None:
                raise invalid(f"'training.{name}' needs a 'validation_file'.", f"training.{name}")


def job_object(job: Job, organization: str) -> dict[str, Any]:
    """The job as the API shows it; every key is always there."""
    succeeded = job.status == "succeeded"
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "model": job.model,
        "organization_id": organization,
        "seed": job.seed,
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": list(job.result_files),
        "trained_tokens": job.trained_tokens,
        "error": job.error,
        "finished_at": job.finished_at,
        "fine_tuned_model": job.fine_tuned_model if succeeded else None,
        "hyperparameters": job.hyperparameters,
        "estimated_finish": job.estimated_finish if job.status == "running" else None,
        "integrations": [],
        "metadata": job.metadata,
        "method": job.method,
        "suffix": job.suffix,
        "adapter": {name: job.adapter.get(name) for name in ADAPTER_DEFAULTS},
        "training": job.training,
        "progress": {name: job.progress.get(name) for name in _PROGRESS},
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model_id,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {name: checkpoint.metrics[name] for name in _METRICS if name in checkpoint.metrics},
    }
