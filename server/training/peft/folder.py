"""A LoRA adapter on disk: a PEFT folder of adapter_config.json and adapter_model.safetensors.

Folders may come from tenants: everything is checked before a tensor is read, and nothing in them is executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from coserve.server.training.peft.config_file import (
    MAX_CONFIG_BYTES,
    AdapterError,
    canonical_config,
    parse_config,
    peft_config,
)
from coserve.server.training.peft.lora import LoraConfig, LoraPair, LoraWeights
from coserve.server.training.peft.patterns import PatternError
from coserve.server.training.peft.sites import Site
from coserve.server.training.tensor_file import (
    DTYPE_NAMES,
    TensorFile,
    TensorFileError,
    open_regular,
    tensor_bytes,
    write_tensors,
)

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
BASE_DIGEST_KEY = "coserve_base_digest"

# Errors of opening that tell what stands in a file's place; all others are the disk's.
_NOT_A_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO})
_PREFIX = "base_model.model."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

__all__ = ["AdapterError", "AdapterUnreadable", "read_folder", "version_digest", "write_folder"]


class AdapterUnreadable(AdapterError):
    """The disk did not give the adapter's files: that says nothing about the adapter, and may pass."""


def read_folder(path: Path, sites: Sequence[Site], base_digest: str | None = None) -> tuple[LoraConfig, LoraWeights]:
    """The adapter in `path`, checked against the base model's `sites`; weights on the CPU in their stored dtype.

    With `base_digest`, a folder that says it was made for another base model is refused. Raises AdapterError
    (AdapterUnreadable where it is not the adapter's fault), and returns either a whole adapter or nothing.
    """
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except OSError as error:
        raise AdapterUnreadable(f"the adapter's folder cannot be read: {error.strerror}", "adapter") from error
    if not is_folder:
        raise AdapterError("the adapter is not a folder", "adapter")
    config = parse_config(_read_config(path))
    try:
        shapes = config.shapes(sites)
    except PatternError as error:
        raise AdapterError(f"a module expression cannot be used: {error}", "target_modules") from error
    if not shapes:
        names = ", ".join(sorted({site.name.rsplit(".", 1)[-1] for site in sites}))
        raise AdapterError(f"target_modules matches no module of the base model; it has {names}", "target_modules")
    by_name = {site.name: site for site in sites}
    expected: dict[str, tuple[int, ...]] = {}
    for name, (rank, _) in shapes.items():
        expected[_tensor_name(name, "A")] = (rank, by_name[name].in_features)
        expected[_tensor_name(name, "B")] = (by_name[name].out_features, rank)
    try:
        tensors = _read_checked(path, expected, base_digest)
    except TensorFileError as error:
        raise AdapterError(str(error), error.tensor or TENSOR_FILE) from error
    except OSError as error:
        raise _unreadable(TENSOR_FILE, error) from error
    weights: LoraWeights = {}
    for name, (_, scaling) in shapes.items():
        b = tensors[_tensor_name(name, "B")].t().contiguous()
        weights[name] = LoraPair(tensors[_tensor_name(name, "A")], b, scaling)
    return config, weights


def write_folder(
    path: Path, config: LoraConfig, weights: LoraWeights, base_model_name: str, base_digest: str | None = None
) -> None:
    """Write the two files into the existing, empty folder `path` and fsync them; stock PEFT loads the result.

    Tensors keep their dtype. Raises ValueError for weights that are not finite: such an adapter is never stored.
    """
    tensors = dict(_peft_tensors(weights))
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name!r} is not finite; it is not written")
    with open(path / CONFIG_FILE, "xb") as file:
        file.write(peft_config(config, base_model_name))
        file.flush()
        os.fsync(file.fileno())
    metadata = {"format": "pt"}
    if base_digest:
        metadata[BASE_DIGEST_KEY] = base_digest
    write_tensors(path / TENSOR_FILE, tensors, metadata)


def version_digest(base_digest: str, config: LoraConfig, weights: LoraWeights) -> str:
    """Hex SHA-256 over the base model's digest, the config in one canonical form and the tensors by name."""
    digest = hashlib.sha256()

    def add(part: bytes | memoryview) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(base_digest.encode())
    add(json.dumps(canonical_config(config), sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    for name, tensor in sorted(_peft_tensors(weights)):
        add(name.encode())
        add(f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
        add(tensor_bytes(tensor))
    return digest.hexdigest()


def _peft_tensors(weights: LoraWeights) -> Iterator[tuple[str, torch.Tensor]]:
    for name, pair in weights.items():
        yield _tensor_name(name, "A"), pair.a.detach().cpu().contiguous()
        yield _tensor_name(name, "B"), pair.b.detach().cpu().t().contiguous()


def _tensor_name(site: str, matrix: str) -> str:
    return f"{_PREFIX}{site}.lora_{matrix}.weight"


def _read_config(path: Path) -> bytes:
    try:
        with open_regular(path / CONFIG_FILE) as file:
            return file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise _unreadable(CONFIG_FILE, error) from error


def _unreadable(name: str, error: OSError) -> AdapterError:
    kind = AdapterError if error.errno in _NOT_A_FILE else AdapterUnreadable
    return kind(f"{name} cannot be read: {error.strerror}", name)


def _read_checked(path: Path, expected: dict[str, tuple[int, ...]], base_digest: str | None) -> dict[str, torch.Tensor]:
    try:
        file = TensorFile(path / TENSOR_FILE)
    except OSError as error:
        if any((path / f"adapter_model{suffix}").exists() for suffix in (".bin", ".pt", ".pth", ".pkl")):
            raise AdapterError(
                "pickled weights are never loaded; save the adapter as safetensors", TENSOR_FILE
            ) from error
        raise _unreadable(TENSOR_FILE, error) from error
    with file:
        made_for = file.metadata.get(BASE_DIGEST_KEY)
        if base_digest and made_for and made_for != base_digest:
            raise AdapterError(
                f"the adapter was made for another base model (digest {made_for[:12]}, this one is {base_digest[:12]})",
                BASE_DIGEST_KEY,
            )
        for name in file.entries:
            if name not in expected:
                raise AdapterError(f"tensor {name[:200]!r} is not expected: {_why_unknown(name)}", name[:200])
        for name, shape in expected.items():
            entry = file.entries.get(name)
            if entry is None:
                raise AdapterError(f"tensor {name!r} is missing: its module is targeted", name)
            if entry.dtype not in _FLOATS:
                floats = ", ".join(DTYPE_NAMES[dtype] for dtype in _FLOATS)
                raise AdapterError(
                    f"tensor {name!r} has dtype {DTYPE_NAMES[entry.dtype]}; weights are one of {floats}", name
                )
            if entry.shape != shape:
                raise AdapterError(
                    f"tensor {name!r} has shape {list(entry.shape)}; this base model and config need {list(shape)}",
                    name,
                )
        tensors = {}
        for name in expected:
            tensors[name] = file.read(name)
            if not bool(torch.isfinite(tensors[name]).all()):
                raise AdapterError(f"tensor {name!r} holds NaN or infinite values", name)
        return tensors


def _why_unknown(name: str) -> str:
    if "lora_embedding" in name:
        return "adapters on embeddings are not supported"
    if "lora_magnitude_vector" in name:
        return "DoRA is not supported"
    if name.endswith(".bias"):
        return "biases are not supported"
    if "lm_head" in name or "embed_tokens" in name:
        return "adapters on embeddings and on the output head are not supported"
    return "the config and the base model have no such module, or its rank or layer is left out"
