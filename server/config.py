"""Every setting of a server, as one validated model, and where each value may come from.

A value is taken from the command line, else the environment (`COSERVE_<FIELD>`), else a TOML file, else the
default. The supervisor resolves the settings once and hands them to its children as one JSON file; nothing
here reads a clock, opens a socket or imports the model libraries.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from coserve.server.tenancy.terms import Milliseconds, Part, TenantTerms, Terms, Timeout
from coserve.server.validation_words import reason_of

ENVIRONMENT_PREFIX = "COSERVE_"

_BYTE_UNITS = {
    "": 1, "B": 1,
    "K": 1024, "KIB": 1024, "KB": 1000,
    "M": 1024**2, "MIB": 1024**2, "MB": 1000**2,
    "G": 1024**3, "GIB": 1024**3, "GB": 1000**3,
    "T": 1024**4, "TIB": 1024**4, "TB": 1000**4,
}  # fmt: skip


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the setting, where it came from and what is allowed."""


def parse_bytes(value: Any) -> Any:
    """Turn `512MiB`, `1.5GB` or `1073741824` into a number of bytes; other types pass through to the validator."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value, re.ASCII)
    unit = _BYTE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{value!r} is not a size: write a number of bytes or one like 512MiB, 2GiB, 1.5GB")
    return int(float(match[1]) * unit)


def parse_object(value: Any) -> Any:
    """Turn a JSON text, as the environment has it, into an object; other types pass through to the validator."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error}): write an object, a tenant's name for a key") from None


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SomeSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """What one server is told. `None` means: chosen at start from the model, the device or a calibration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="folder of the base model, or a hub id")
    served_model_name: str | None = Field(
        default=None, min_length=1, max_length=256, description="the base model's id in the API"
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free port")
    data_dir: Path = Path("coserve-data")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="CPU threads of the engine")
    max_model_len: int | None = Field(default=None, ge=1, description="longest context, in tokens")
    kv_memory: Bytes | None = None
    adapter_memory: Bytes | None = None
    activation_memory: Bytes | None = None
    adapter_cache_memory: Bytes | None = None
    block_size: int = Field(default=16, ge=1, description="tokens a K/V block")
    adapter_page_rows: int = Field(default=8, ge=1, description="rank rows a page of an adapter, at most")
    max_running: int | None = Field(default=None, ge=1, description="sequences that run at once")

    slo_ttft_ms: Milliseconds | None = Field(default=None, description="promise for the first token")
    slo_itl_ms: Milliseconds | None = Field(default=None, description="promise between tokens")
    slo_batch_ttft_ms: Milliseconds | None = Field(default=None, description="the first one, of batch requests")
    slo_batch_itl_ms: Milliseconds | None = Field(default=None, description="the second one, of batch requests")
    floor_share: float = Field(default=0.02, ge=0, le=0.9, allow_inf_nan=False, description="training's least part")
    train_window: int | None = Field(default=None, ge=1, description="most tokens of a training window")
    activations: Literal["auto", "save", "recompute"] = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"

    tenants: Annotated[dict[str, TenantTerms], BeforeValidator(parse_object)] = Field(default={}, max_length=100_000)
    tenant_kv_share: Part = 1.0
    tenant_prefix_share: Part = 1.0
    tenant_adapter_share: Part = 1.0

    max_waiting: int = Field(default=1024, ge=1)
    max_waiting_tenant: int = Field(default=256, ge=1)
    max_jobs_running: int = Field(default=8, ge=1)
    max_jobs_queued_tenant: int = Field(default=64, ge=1)
    request_timeout_seconds: Timeout | None = Field(default=None, description="after which a request is ended")
    job_slice_seconds: Seconds = Field(default=60.0, description="how long a job keeps its slot, whoever waits")

    max_body: Bytes = 8 * 1024**2
    max_header: Bytes = 32 * 1024
    max_upload: Bytes = 512 * 1024**2
    stream_buffer: Bytes = 256 * 1024
    stream_stall_seconds: SomeSeconds = 30.0
    keepalive_seconds: SomeSeconds = 15.0

    grace_seconds: Seconds = Field(default=30.0, description="how long a shutdown waits for running streams")
    engine_silence_seconds: SomeSeconds = Field(default=20.0, description="heartbeat age after which it is not ready")
    engine_patience_seconds: Seconds = Field(default=10.0, description="how long requests queue for a lost engine")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def terms(self) -> Terms:
        parts = self.tenant_kv_share, self.tenant_prefix_share, self.tenant_adapter_share
        return Terms(self.tenants, parts, self.request_timeout_seconds)

    @property
    def base_model_id(self) -> str:
        """The base model's id in the API: the served name, else the last segment of `model`."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]


def resolve_settings(
    command_line: Mapping[str, Any],
    *,
    environ: Mapping[str, str] = os.environ,
    config_file: Path | None = None,
) -> Settings:
    """Merge the sources into one Settings; entries of `command_line` that are None count as not given.

    Raises SettingsError with the setting's name, its source and the reason.
    """
    if config_file is None and environ.get(f"{ENVIRONMENT_PREFIX}CONFIG"):
        config_file = Path(environ[f"{ENVIRONMENT_PREFIX}CONFIG"])
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(name: str, value: Any, source: str) -> None:
        values[name] = value
        sources[name] = source

    for name, value in (_read_toml(config_file) if config_file else {}).items():
        take(name.replace("-", "_"), value, f"in {config_file}")
    for name in Settings.model_fields:
        variable = ENVIRONMENT_PREFIX + name.upper()
        if environ.get(variable):
            take(name, environ[variable], f"in the environment variable {variable}")
    for name, value in command_line.items():
        if value is not None:
            take(name, value, f"given as --{name.replace('_', '-')}")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explain(error, sources)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} is not valid TOML: {error}") from None


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "settings"
    field = name.split(".")[0]
    option = f"--{field.replace('_', '-')}"
    if first["type"] == "missing":
        variable = ENVIRONMENT_PREFIX + field.upper()
        return f"{name} is not set: give {option}, the environment variable {variable} or an entry in the settings file"
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(Settings.model_fields))
        return f"unknown setting {name} {sources.get(field, '')}: known are {known}"
    return f"{name} {sources.get(field, '')} cannot be used: {reason_of(first)}"


def write_process_settings(path: Path, settings: Settings, socket_path: str) -> None:
    """Write what the child processes read, the settings and the engine's socket; only the owner can read it."""
    document = {**settings.model_dump(mode="json"), "socket_path": socket_path}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)


def read_process_settings(path: Path) -> tuple[Settings, str]:
    """The settings and the engine's socket path, as `write_process_settings` left them."""
    document = json.loads(path.read_text(encoding="utf-8"))
    socket_path = document.pop("socket_path")
    return Settings.model_validate(document), str(socket_path)
