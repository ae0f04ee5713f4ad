"""Rows of training in blocks of the K/V cache: where each row of each column lies, and how it is written and read.

A *column* is what is kept of every row of a stream in one layer: the layer's input, keys, values, a frozen product. A
row of a column takes whole cells, its rows lie one after the other, and the columns one after the other, in the cells
of the keys of all blocks and then in those of the values. Where the blocks are consecutive a column is read as a view;
elsewhere its cells are gathered. It may assume that the blocks are nobody else's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from coserve.kernels.transfer import to_device
from coserve.server.engine.kv_cache import KVCache, LayerShape

Widths = Mapping[str, int]  # column -> elements a row


Density = frozenset[tuple[int, int]]  # (cells a row, cells a block), one pair for each kind of layer


def density(layers: Sequence[LayerShape], widths: Sequence[Widths], block_size: int) -> Density:
    """How rows of these columns fill blocks; `widths` has one entry a layer."""
    return frozenset(
        (
            sum(_cells(width, shape.cell) for width in columns.values()),
            shape.key_cells(block_size) + shape.value_cells(block_size),
        )
        for shape, columns in zip(layers, widths, strict=True)
    )


def blocks_of(rows: int, filled: Density) -> int:
    """Blocks that so many rows take."""
    return max(-(-rows * a_row // a_block) for a_row, a_block in filled)


def rows_in(blocks: int, filled: Density) -> int:
    """Rows that so many blocks hold."""
    return min(blocks * a_block // a_row for a_row, a_block in filled)


class RowPages:
    """`rows` rows of the columns of every layer, in `blocks` (ascending)."""

    def __init__(self, cache: KVCache, widths: Sequence[Widths], blocks: Sequence[int], rows: int) -> None:
        self.blocks, self.rows = list(blocks), rows
        self._cache, self._widths = cache, widths
        self._layers: dict[tuple[LayerShape, tuple[tuple[str, int], ...]], _Layer] = {}  # most layers are alike
        self._of = [self._layer(shape, columns) for shape, columns in zip(cache.layers, widths, strict=True)]

    def _layer(self, shape: LayerShape, columns: Widths) -> _Layer:
        key = shape, tuple(columns.items())
        if key not in self._layers:
            self._layers[key] = _Layer(self._cache, shape, columns, self.blocks, self.rows)
        return self._layers[key]

    def tensors(self) -> Iterator[Tensor]:
        """What it holds beside the blocks."""
        for places in self._layers.values():
            yield from places.indices.values()

    def columns(self, layer: int) -> Widths:
        return self._widths[layer]

    def write(self, layer: int, column: str, start: int, values: Tensor) -> None:
        """values [n, width] become rows [start, start + n) of a column."""
        places = self._of[layer]
        per_row, width = places.per_row[column], self._widths[layer][column]
        cells, run = self._cache.cells[layer], places.run(column, start, start + values.shape[0])
        if run is not None:
            cells[run].view(-1, per_row * cells.shape[1])[:, :width] = values
            return
        whole = pad(values, (0, per_row * cells.shape[1] - width)).reshape(-1, cells.shape[1])
        cells.index_copy_(0, places.index(column, start, start + values.shape[0]), whole)

    def read(self, layer: int, column: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a column [end - start, width]: a view, or a copy."""
        places = self._of[layer]
        per_row, width = places.per_row[column], self._widths[layer][column]
        cells, run = self._cache.cells[layer], places.run(column, start, end)
        found = cells[run] if run is not None else cells.index_select(0, places.index(column, start, end))
        return found.view(end - start, per_row * cells.shape[1])[:, :width]


class _Layer:
    """Where the columns of one kind of layer lie."""

    def __init__(self, cache: KVCache, shape: LayerShape, columns: Widths, blocks: Sequence[int], rows: int) -> None:
        self._device, self._rows = cache.device, rows
        self.per_row = {name: _cells(width, shape.cell) for name, width in columns.items()}
        self._first: dict[str, int] = {}
        at = 0
        for name, per_row in self.per_row.items():
            self._first[name] = at
            at += per_row * rows
        keys, values = shape.key_cells(cache.block_size), shape.value_cells(cache.block_size)
        numbers = np.asarray(blocks, dtype=np.int64)[:, None]
        all_keys = cache.keys[0].shape[0] // cache.block_size * keys  # those of the scratch block included
        self._cells = np.concatenate(
            [(numbers * keys + np.arange(keys)).ravel(), (all_keys + numbers * values + np.arange(values)).ravel()]
        )
        if at > len(self._cells):
            raise ValueError(f"{rows} rows take {at} cells and {len(blocks)} blocks have {len(self._cells)}")
        self.indices: dict[str, Tensor] = {}

    def run(self, column: str, start: int, end: int) -> slice | None:
        """The cells of rows [start, end), if they are consecutive (cells only ascend)."""
        first, per_row = self._first[column], self.per_row[column]
        if start >= end:
            return slice(0, 0)
        low, high = self._cells[first + start * per_row], self._cells[first + end * per_row - 1]
        return slice(int(low), int(high) + 1) if high - low == (end - start) * per_row - 1 else None

    def index(self, column: str, start: int, end: int) -> Tensor:
        """The cells of rows [start, end), int64."""
        first, per_row = self._first[column], self.per_row[column]
        if column not in self.indices:
            whole = torch.from_numpy(self._cells[first : first + self._rows * per_row])
            self.indices[column] = to_device(whole, self._device)
        return self.indices[column][start * per_row : end * per_row]


def _cells(width: int, cell: int) -> int:
    return -(-width // cell)
