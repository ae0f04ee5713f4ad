"""What the engine is told at start: the part of the server's settings that it needs, resolved for its device."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """None means: chosen from the model, the device or the calibration. Bytes are bytes, times milliseconds."""

    model: str
    data_dir: Path
    socket_path: str
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    kv_memory: int | None = None
    adapter_memory: int | None = None
    activation_memory: int | None = None
    adapter_cache_memory: int | None = None
    block_size: int = 16
    adapter_page_rows: int = 8
    max_running: int | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    slo_batch_ttft_ms: float | None = None
    slo_batch_itl_ms: float | None = None
    floor_share: float = 0.02
    train_window: int | None = None
    activations: str = "auto"
    kernels: str = "auto"  # see `backend.choose_backend`
    plan_ahead: bool | None = None  # while an iteration runs; None: where the device works on by itself
    log_level: str = "info"

    @staticmethod
    def read(path: Path) -> EngineOptions:
        """From the supervisor's settings file; settings that are not the engine's are passed over."""
        values: dict[str, Any] = json.loads(path.read_text())
        known = {field.name for field in fields(EngineOptions)}
        chosen = {name: value for name, value in values.items() if name in known}
        return EngineOptions(**{**chosen, "data_dir": Path(chosen["data_dir"])})

    def torch_device(self) -> torch.device:
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)

    def torch_dtype(self) -> torch.dtype:
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        return names[self.dtype]

    def kv_bytes(self) -> int:
        if self.kv_memory is not None:
            return self.kv_memory
        return (1024 if self.torch_device().type == "cpu" else 8192) * _MIB

    def adapter_bytes(self) -> int:
        if self.adapter_memory is not None:
            return self.adapter_memory
        return (256 if self.torch_device().type == "cpu" else 2048) * _MIB

    def running(self) -> int:
        return self.max_running or (64 if self.torch_device().type == "cpu" else 256)

    def window(self) -> int:
        # Past 64 rows a CPU's products gain nothing more; a GPU wants longer ones.
        return self.train_window or (256 if self.torch_device().type == "cpu" else 1024)

    def activation_bytes(self) -> int:
        if self.activation_memory is not None:
            return self.activation_memory
        # A constant, not what is free now: how a step is cut must not change across a restart.
        return 2048 * _MIB if self.torch_device().type == "cpu" else 16384 * _MIB

    def adapter_cache_bytes(self) -> int:
        """Of parsed adapters in the host's memory: twice what a CPU's pool holds by default."""
        if self.adapter_cache_memory is not None:
            return self.adapter_cache_memory
        return (512 if self.torch_device().type == "cpu" else 2048) * _MIB
