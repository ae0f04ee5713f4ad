"""Reads and writes safetensors files with checks of our own, for files that a tenant may have made.

A file is read through one descriptor and never mapped: a mapped file that shrinks ends the process. Output
is a function of the tensors alone, byte for byte.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(ValueError):
    """The file is not what it says; `tensor` names the tensor at fault, where there is one."""

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file whose header has been checked: sizes, dtypes, no overlap, no gap, nothing behind.

    Raises TensorFileError; OSError when the file cannot be opened (a symbolic link counts as that).
    """

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        try:
            self.entries, self.metadata = _read_header(self._file, path.name)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored dtype, in memory of its own."""
        entry = self.entries[name]
        buffer = bytearray(entry.stop - entry.start)
        self._file.seek(entry.start)
        if self._file.readinto(buffer) != len(buffer):
            raise TensorFileError(f"the file ends within tensor {name!r}", name)
        if not buffer:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


def open_regular(path: Path) -> io.BufferedReader:
    """Open without following a link at the path's end and without waiting for a pipe's other end. Raises OSError."""
    return io.open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: UP020 - of a descriptor


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.entries}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write and fsync a new file; fails if it is there. The directory is left to the caller."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    # widest elements first, so that every tensor is aligned to its element
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    place = 0
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            file.write(tensor_bytes(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row order, little-endian, as stored."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def parse_json(text: bytes, what: str) -> Any:
    """JSON without duplicate keys, NaN or Infinity, and without unbounded depth. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError(f"{what} has a key twice in one object")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{what} contains {constant}, which is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _read_header(file: io.BufferedReader, label: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise TensorFileError(f"{label} is not a regular file")
    if status.st_size < 8:
        raise TensorFileError(f"{label} has {status.st_size} bytes: too short for a safetensors file")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES or length > status.st_size - 8:
        raise TensorFileError(
            f"{label} announces a header of {length} bytes in a file of {status.st_size} bytes; "
            f"at most {MAX_HEADER_BYTES} are read"
        )
    text = file.read(length)
    if len(text) != length:
        raise TensorFileError(f"{label} ends within its header")
    try:
        header = parse_json(text, f"the header of {label}")
    except ValueError as error:
        raise TensorFileError(str(error)) from error
    if not isinstance(header, dict):
        raise TensorFileError(f"the header of {label} is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"__metadata__ of {label} must map strings to strings")
    data = 8 + length
    entries = {name: _entry(name, value, data) for name, value in header.items()}
    place = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != place:
            fault = "overlaps the tensor before it" if entry.start < place else "leaves a gap before it"
            raise TensorFileError(f"tensor {entry.name!r} {fault} in {label}", entry.name)
        place = entry.stop
        if place > status.st_size:
            raise TensorFileError(f"{label} is truncated: tensor {entry.name!r} ends behind the file's end", entry.name)
    if place != status.st_size:
        raise TensorFileError(f"{label} has {status.st_size - place} bytes behind its last tensor")
    return entries, metadata


def _entry(name: str, value: Any, data: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"tensor {name!r} must have exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorFileError(f"tensor {name!r} has dtype {str(dtype)[:40]!r}; supported: {', '.join(DTYPES)}", name)
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise TensorFileError(f"tensor {name!r} has a malformed shape", name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorFileError(f"tensor {name!r} has malformed data_offsets", name)
    size = torch.empty((), dtype=DTYPES[dtype]).element_size()
    for extent in shape:
        size *= extent
    if size != offsets[1] - offsets[0]:
        raise TensorFileError(
            f"tensor {name!r} of shape {shape} needs {size} bytes and has {offsets[1] - offsets[0]}", name
        )
    return TensorEntry(name, DTYPES[dtype], tuple(shape), data + offsets[0], data + offsets[1])


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)
