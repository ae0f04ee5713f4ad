"""Writes the tokens file that the engine trains from, row by row, in memory that grows by 8 bytes a row.

A safetensors file: `input_ids` int32 [tokens], `labels` int32 [tokens], `offsets` int64 [rows + 1]. It appears under
its name only when it is whole and on disk.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from coserve.server.data.token_row import TokenRow
from coserve.server.store.atomic import atomic_file


class TokenFileWriter:
    def __init__(self, ids: BinaryIO, labels: BinaryIO) -> None:
        self._ids = ids
        self._labels = labels
        self._offsets = array("q", [0])

    @property
    def rows(self) -> int:
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        return self._offsets[-1]

    def add(self, row: TokenRow) -> None:
        self._ids.write(np.asarray(row.ids, dtype="<i4").tobytes())
        self._labels.write(np.asarray(row.labels, dtype="<i4").tobytes())
        self._offsets.append(self._offsets[-1] + len(row.ids))

    def save(self, path: Path) -> None:
        """Write the file at `path`, atomically. Raises OSError (a full disk leaves nothing behind)."""
        tokens, offsets = 4 * self.tokens, 8 * len(self._offsets)
        # Widest type first, as safetensors' own writer has it, so that every array is aligned.
        header = json.dumps(
            {
                "offsets": {"dtype": "I64", "shape": [len(self._offsets)], "data_offsets": [0, offsets]},
                "input_ids": {"dtype": "I32", "shape": [self.tokens], "data_offsets": [offsets, offsets + tokens]},
                "labels": {
                    "dtype": "I32", "shape": [self.tokens], "data_offsets": [offsets + tokens, offsets + 2 * tokens],
                },
            },
            separators=(",", ":"),
        ).encode("ascii")  # fmt: skip
        header += b" " * (-len(header) % 8)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(path) as target:
            target.write(struct.pack("<Q", len(header)) + header)
            target.write(np.frombuffer(self._offsets, dtype=np.int64).astype("<i8").tobytes())
            for part in (self._ids, self._labels):
                part.seek(0)
                shutil.copyfileobj(part, target, 2**20)


@contextlib.contextmanager
def token_file_writer(folder: Path) -> Iterator[TokenFileWriter]:
    """A writer whose scratch space is unnamed files in `folder`, gone when the block ends."""
    with tempfile.TemporaryFile(dir=folder) as ids, tempfile.TemporaryFile(dir=folder) as labels:
        yield TokenFileWriter(ids, labels)
