"""spec.json, the order for one finetuning job: a strict parser into frozen dataclasses.

The file was written by the gateway after validation; it is checked again because the engine must survive any file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from coserve.server.training.peft.lora import MAX_RANK
from coserve.server.training.tensor_file import parse_json

MAX_SPEC_BYTES = 1024 * 1024
SCHEDULERS = ("cosine", "linear", "constant")


class SpecError(ValueError):
    """spec.json is malformed; the message names the field."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    r: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    init: str | None  # PEFT folder to start from, relative to the data directory


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    learning_rate: float
    lr_scheduler: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float | None  # None or 0: gradients are not clipped
    betas: tuple[float, float]
    eps: float
    batch_size: int
    gradient_accumulation_steps: int
    n_epochs: int
    max_steps: int | None
    shuffle: bool
    eval_every: int | None
    early_stopping_patience: int | None
    checkpoint_every: int | None
    keep_checkpoints: int
    publish_every: int | None
    priority: str

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, slots=True)
class JobSpec:
    job_id: str
    tenant: str
    seed: int
    base_digest: str
    adapter: AdapterSpec
    training: TrainingSpec
    has_validation: bool


def parse_spec(text: bytes) -> JobSpec:
    """Raises SpecError naming the field that is missing, unknown or out of range."""
    if len(text) > MAX_SPEC_BYTES:
        raise SpecError(f"spec.json is larger than {MAX_SPEC_BYTES} bytes")
    try:
        value = parse_json(text, "spec.json")
    except ValueError as error:
        raise SpecError(str(error)) from error
    fields = _Fields(value, "spec.json")
    spec = JobSpec(
        job_id=fields.take("job_id", _text),
        tenant=fields.take("tenant", _text),
        seed=fields.take("seed", _integer(0, 2**63 - 1)),
        base_digest=fields.take("base_digest", _text),
        adapter=_adapter(_Fields(fields.take("adapter", _any), "adapter")),
        training=_training(_Fields(fields.take("training", _any), "training")),
        has_validation=fields.take("has_validation", _boolean),
    )
    fields.done()
    return spec


def _adapter(fields: _Fields) -> AdapterSpec:
    fields.take("type", _choice("lora"))
    adapter = AdapterSpec(
        r=fields.take("r", _integer(1, MAX_RANK)),
        alpha=fields.take("alpha", _number(0, 1e6)),
        dropout=fields.take("dropout", _number(0, 0.999999)),
        target_modules=fields.take("target_modules", _targets),
        init=fields.take("init", _optional(_relative_path)),
    )
    fields.done()
    return adapter


def _training(fields: _Fields) -> TrainingSpec:
    many = 2**31 - 1
    training = TrainingSpec(
        learning_rate=fields.take("learning_rate", _number(0, 1e3)),
        lr_scheduler=fields.take("lr_scheduler", _choice(*SCHEDULERS)),
        warmup_steps=fields.take("warmup_steps", _integer(0, many)),
        weight_decay=fields.take("weight_decay", _number(0, 1e3)),
        max_grad_norm=fields.take("max_grad_norm", _optional(_number(0, 1e9))),
        betas=fields.take("betas", _betas),
        eps=fields.take("eps", _number(0, 1)),
        batch_size=fields.take("batch_size", _integer(1, 65536)),
        gradient_accumulation_steps=fields.take("gradient_accumulation_steps", _integer(1, 65536)),
        n_epochs=fields.take("n_epochs", _integer(1, 100_000)),
        max_steps=fields.take("max_steps", _optional(_integer(1, many))),
        shuffle=fields.take("shuffle", _boolean),
        eval_every=fields.take("eval_every", _optional(_integer(1, many))),
        early_stopping_patience=fields.take("early_stopping_patience", _optional(_integer(1, many))),
        checkpoint_every=fields.take("checkpoint_every", _optional(_integer(1, many))),
        keep_checkpoints=fields.take("keep_checkpoints", _integer(1, many)),
        publish_every=fields.take("publish_every", _optional(_integer(1, many))),
        priority=fields.take("priority", _choice("normal", "low")),
    )
    fields.done()
    return training


class _Fields:
    """The members of one object, each taken once; what is left over is unknown."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise SpecError(f"{where} must be an object")
        self._left = dict(value)
        self._where = where

    def take(self, name: str, check: Callable[[Any], Any]) -> Any:
        if name not in self._left:
            raise SpecError(f"{self._where} lacks {name!r}")
        try:
            return check(self._left.pop(name))
        except ValueError as error:
            raise SpecError(f"{name} of {self._where}: {error}") from error

    def done(self) -> None:
        if self._left:
            raise SpecError(f"{self._where} has unknown fields: {', '.join(sorted(self._left))[:200]}")


def _any(value: Any) -> Any:
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 512:
        raise ValueError("must be a text of 1 to 512 characters")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _integer(least: int, most: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return value

    return check


def _number(least: float, most: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"must be a number from {least} to {most}")
        return float(value)

    return check


def _choice(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return check


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be two numbers")
    check = _number(0, 0.9999999)
    return check(value[0]), check(value[1])


def _targets(value: Any) -> str | tuple[str, ...]:
    if value == "all-linear":
        return value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError("must be 'all-linear' or a list of module names")
    return tuple(sorted(set(value)))


def _relative_path(value: Any) -> str:
    text = _text(value)
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\x00" in text:
        raise ValueError("must be a path inside the data directory")
    return text
