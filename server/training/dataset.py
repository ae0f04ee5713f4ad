"""The tokenized rows of a job, and which of them each optimizer step takes.

Rows stay in the file, which the gateway wrote once and nobody changes; the order is a function of seed and epoch only.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from coserve.server.training.tensor_file import TensorEntry, TensorFile, TensorFileError

IGNORED_LABEL = -100


class DatasetError(ValueError):
    """The token file cannot be trained on; the message says why."""


class TokenRows:
    """The rows of one tokens/*.safetensors file: input_ids and labels int32 [N], offsets int64 [rows + 1].

    Labels are aligned with the input ids (the shift happens here and in the engine); -100 bears no loss.
    Raises DatasetError when the file is malformed or, with `vocab_size`, when an id is outside the vocabulary.
    """

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        try:
            with TensorFile(path) as file:
                wanted = {"input_ids": torch.int32, "labels": torch.int32, "offsets": torch.int64}
                if {name: entry.dtype for name, entry in file.entries.items()} != wanted:
                    raise DatasetError(f"{path.name} must hold input_ids and labels as int32 and offsets as int64")
                if any(len(entry.shape) != 1 for entry in file.entries.values()):
                    raise DatasetError(f"{path.name} must hold one-dimensional arrays")
                self._offsets = file.read("offsets").numpy()
                self._input_ids = _map(path, file.entries["input_ids"])
                self._labels = _map(path, file.entries["labels"])
        except (TensorFileError, OSError) as error:
            raise DatasetError(f"{path.name} cannot be read: {error}") from error
        self._check(path.name, vocab_size)
        firsts = self._labels[self._offsets[:-1]]  # a row's first label bears no loss
        bearing = np.count_nonzero(self._labels != IGNORED_LABEL) - np.count_nonzero(firsts != IGNORED_LABEL)
        self.loss_tokens = int(bearing)  # of all rows

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return len(self._input_ids)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of one row, int64 [N] each."""
        window = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        return self._input_ids[window].astype(np.int64), self._labels[window].astype(np.int64)

    def _check(self, name: str, vocab_size: int | None) -> None:
        total = len(self._input_ids)
        if len(self._labels) != total:
            raise DatasetError(f"{name} has {total} input ids and {len(self._labels)} labels")
        if len(self._offsets) < 2:
            raise DatasetError(f"{name} has no rows")
        if self._offsets[0] != 0 or self._offsets[-1] != total or bool((np.diff(self._offsets) < 1).any()):
            raise DatasetError(f"{name} has offsets that do not cut its {total} tokens into rows")
        if vocab_size is not None:
            low, high = int(self._input_ids.min()), int(self._input_ids.max())
            labels = self._labels[self._labels != IGNORED_LABEL]
            if labels.size:
                low, high = min(low, int(labels.min())), max(high, int(labels.max()))
            if low < 0 or high >= vocab_size:
                raise DatasetError(
                    f"{name} has token ids from {low} to {high}; the vocabulary is 0 to {vocab_size - 1}"
                )


def order(rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The rows of one epoch as int64 [rows]: the file's order, or a permutation drawn from (seed, epoch)."""
    if not shuffle:
        return np.arange(rows, dtype=np.int64)
    # raw words of a counter-based generator, sorted: unlike Generator.permutation, fixed by numpy for all versions
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int64)


def steps_per_epoch(rows: int, step_rows: int) -> int:
    """A partial last step is kept."""
    return math.ceil(rows / step_rows)


def total_steps(rows: int, step_rows: int, epochs: int, max_steps: int | None) -> int:
    steps = epochs * steps_per_epoch(rows, step_rows)
    return steps if max_steps is None else min(steps, max_steps)


def loss_positions(labels: np.ndarray) -> int:
    """How many positions bear loss: a row's first label has no position that predicts it."""
    return int((labels[1:] != IGNORED_LABEL).sum())


def _map(path: Path, entry: TensorEntry) -> np.ndarray:
    if entry.start == entry.stop:
        return np.empty(0, dtype=np.int32)
    return np.memmap(path, dtype=np.int32, mode="r", offset=entry.start, shape=entry.shape)
