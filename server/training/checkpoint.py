"""Checkpoints of a job: a PEFT folder that can be served, and beside it what training needs to go on.

A checkpoint is written under a temporary name, synced and renamed, so that a folder named step-… is whole, whatever
happened while it was written. Reading checks every byte against the digests in state.json.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from coserve.server.training.durable import replace_file, sync_directory
from coserve.server.training.peft.folder import AdapterError, read_folder, version_digest, write_folder
from coserve.server.training.peft.lora import LoraConfig, LoraWeights
from coserve.server.training.peft.sites import Site
from coserve.server.training.progress import Progress
from coserve.server.training.tensor_file import TensorFileError, parse_json, read_tensors, tensor_bytes, write_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
TEMPORARY_PREFIX = ".tmp-"
RESUMABLE_KEPT = 2  # checkpoints that keep their optimizer state: the newest, and one to fall back to


class CheckpointError(ValueError):
    """The folder is not a checkpoint that training can go on from."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint as read: weights in their stored dtype on the CPU, the optimizer's tensors by name."""

    config: LoraConfig
    weights: LoraWeights
    optimizer: dict[str, torch.Tensor]
    state: Progress


class CheckpointStore:
    """The checkpoints/ folder of one job. Only its owner writes to it; opening removes what a crash left half done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.name.startswith(TEMPORARY_PREFIX):
                shutil.rmtree(entry)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        matches = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def resumable(self, step: int) -> bool:
        return (self.path(step) / OPTIMIZER_FILE).is_file()

    def write(
        self,
        state: Progress,
        config: LoraConfig,
        weights: LoraWeights,
        optimizer: Mapping[str, torch.Tensor],
        *,
        base_digest: str,
        base_model_name: str,
    ) -> Path:
        """Store a checkpoint durably and return its folder. Weights must be finite (ValueError).

        Raises OSError when there is no room; nothing is left behind then.
        """
        final = self.path(state.step)
        if final.exists():
            self.remove(state.step)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{final.name}"
        try:
            temporary.mkdir()
            write_folder(temporary, config, weights, base_model_name, base_digest)
            write_tensors(temporary / OPTIMIZER_FILE, optimizer)
            replace_file(temporary / STATE_FILE, _state_text(state))
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self.folder)
        return final

    def update_state(self, state: Progress) -> None:
        """Replace state.json of the checkpoint at state.step; its tensors stay."""
        replace_file(self.path(state.step) / STATE_FILE, _state_text(state))

    def state(self, step: int) -> Progress:
        """Raises CheckpointError."""
        try:
            return _parse_state((self.path(step) / STATE_FILE).read_bytes())
        except FileNotFoundError as error:
            raise CheckpointError(f"{STATE_FILE} is missing") from error

    def read(self, step: int, sites: Sequence[Site], base_digest: str) -> Restored:
        """Everything needed to go on from `step`.

        Raises CheckpointError when any of it is missing or altered, and OSError when the disk does not answer: only
        the first says something about the checkpoint.
        """
        if not self.resumable(step):
            raise CheckpointError("it has no optimizer state")
        state = self.state(step)
        try:
            config, weights = read_folder(self.path(step), sites, base_digest)
            optimizer = read_tensors(self.path(step) / OPTIMIZER_FILE)
        except (AdapterError, TensorFileError) as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from error
            raise CheckpointError(str(error)) from error
        if version_digest(base_digest, config, weights) != state.digest:
            raise CheckpointError("the adapter does not have the digest that it was written with")
        if tensors_digest(optimizer) != state.optimizer_digest:
            raise CheckpointError("the optimizer state does not have the digest that it was written with")
        return Restored(config, weights, optimizer, state)

    def remove(self, step: int) -> None:
        """Remove a whole checkpoint: renamed first, so that it is never seen half removed."""
        temporary = self.folder / f"{TEMPORARY_PREFIX}removed-{step:08d}"
        self.path(step).rename(temporary)
        shutil.rmtree(temporary)
        sync_directory(self.folder)

    def prune(self, keep: int, protected: frozenset[int] = frozenset()) -> list[int]:
        """Keep the newest `keep` and the protected ones; returns the steps whose folders are gone.

        Optimizer state, the larger part, goes first: only the newest RESUMABLE_KEPT have it.
        """
        steps = self.steps()
        for step in steps[:-RESUMABLE_KEPT]:
            (self.path(step) / OPTIMIZER_FILE).unlink(missing_ok=True)
        gone = [step for step in steps[: max(0, len(steps) - keep)] if step not in protected]
        for step in gone:
            self.remove(step)
        return gone


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        label = f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode()
        digest.update(len(label).to_bytes(8, "little") + label)
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _parse_state(text: bytes) -> Progress:
    try:
        return Progress(**parse_json(text, STATE_FILE))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{STATE_FILE} is malformed: {error}") from error


def _state_text(state: Progress) -> bytes:
    return (json.dumps(asdict(state), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
