"""From a model folder or hub id to a `BaseModel`: what is accepted, what memory it takes, what it is called.

Weights come from safetensors only, code only from the installed transformers. A model that does not fit or
cannot be run exactly is refused before or right after loading, with the reason and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from coserve.server.engine.attention import ATTENTION_NAME, UnsupportedModel, register
from coserve.server.engine.backend import Backend, choose_backend
from coserve.server.engine.memory import memory_problem
from coserve.server.engine.model import BaseModel
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.probe import probe
from coserve.server.engine.product import packing_available


class ModelRefused(RuntimeError):
    """The model cannot be served; the message names the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    base: BaseModel
    digest: str  # hex SHA-256 over config and weight files
    model_type: str
    max_model_len: int


def load_model(options: EngineOptions) -> LoadedModel:
    """Raises ModelRefused."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the engine's standard error is a log
    folder = _folder(options.model)
    config_values = _read_config(folder)
    weights = _weight_files(folder)
    register()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelRefused(f"{folder}: config.json is not one transformers can read: {_line(error)}") from error
    if config_values.get("quantization_config"):
        raise ModelRefused(f"{folder}: the weights are quantised; convert the model to plain safetensors first")
    dtype, device = options.torch_dtype(), options.torch_device()
    backend = _backend(folder, config, options)
    # Packed products keep a blocked copy of each weight, and one of its transpose.
    copies = 3 if packing_available(dtype, device) else 1
    problem = memory_problem(_elements(weights) * dtype.itemsize * copies, config, dtype, options)
    if problem is not None:
        raise ModelRefused(f"{folder}: {problem}")
    try:
        # Plain torch says the same on every device; kernels are tried where they will run.
        probe(config, backend, device if backend.name == "triton" else "cpu", dtype)
    except UnsupportedModel as error:
        raise ModelRefused(f"{folder}: this model ({config.model_type}) is not supported: {error}") from error
    digest = _digest(folder, weights)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True,
            use_safetensors=True,
        )  # fmt: skip
        base = BaseModel(model.to(device), backend=backend)
    except (UnsupportedModel, ValueError, OSError, SafetensorError, RuntimeError) as error:
        raise ModelRefused(f"{folder}: the model cannot be loaded: {_line(error)}") from error
    longest = getattr(config, "max_position_embeddings", None) or 4096
    chosen = options.max_model_len or longest
    if chosen > longest:
        raise ModelRefused(f"--max-model-len {chosen} is over the {longest} positions this model was made for")
    return LoadedModel(base, digest, str(config.model_type), int(chosen))


def _backend(folder: Path, config: Any, options: EngineOptions) -> Backend:
    try:
        backend = choose_backend(options.kernels, options.torch_dtype(), options.torch_device())
    except ValueError as error:
        raise ModelRefused(f"{folder}: {error}") from error
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    head = int(getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) or 0) // max(heads, 1))
    if backend.largest_head is not None and head > backend.largest_head:
        raise ModelRefused(
            f"{folder}: its attention heads have {head} values and the kernels take at most {backend.largest_head}; "
            "set COSERVE_KERNELS=torch, which is slower, or choose another model"
        )
    return backend


def _folder(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise ModelRefused(f"{model}: there is no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelRefused(
            f"{model}: no such folder here, and the hub did not give it: {_line(error)}; "
            "give a local folder, or check the id and the network"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ModelRefused(f"{folder}: no config.json: this is not a model folder") from None
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{folder}: config.json cannot be read: {_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelRefused(f"{folder}: config.json is not a JSON object")
    return values


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        unsafe = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        found = f"; {', '.join(sorted(unsafe))} can run code when it is read and is refused" if unsafe else ""
        raise ModelRefused(f"{folder}: no .safetensors weights{found}; save the model with save_pretrained first")
    return files


def _elements(files: list[Path]) -> int:
    """Of all weights together."""
    elements = 0
    for file in files:
        if not os.access(file, os.R_OK):
            raise ModelRefused(f"{file}: not readable by this user; change its permissions")
        try:
            with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call]
                for name in tensors.keys():  # noqa: SIM118
                    shape = tensors.get_slice(name).get_shape()
                    elements += int(torch.Size(shape).numel())
        except (SafetensorError, OSError) as error:
            raise ModelRefused(f"{file}: not a whole safetensors file: {_line(error)}") from error
    return elements


def _digest(folder: Path, files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in [folder / "config.json", *files]:
        with file.open("rb") as content:
            whole.update(hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
