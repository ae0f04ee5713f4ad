"""Fixed shapes of decode iterations: how rows are rounded up, and where what a graph reads is written."""

from __future__ import annotations

import numpy as np
import pytest

from coserve.server.engine.decode_shapes import DecodeArrays, DecodeRow, DecodeShape, rows_for, shape_for, sizes


def test_rows_are_rounded_up_by_little():
    found = [rows_for(n) for n in range(1, 600)]
    assert found[:9] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(size >= n and size - n < max(8, 0.25 * n) for n, size in enumerate(found, 1))
    assert found == sorted(found) and len(set(found)) < 32
    assert sizes(600) == tuple(dict.fromkeys([*found, rows_for(600)])) and sizes(5) == (1, 2, 4, 8)


@pytest.mark.parametrize("largest,rank", [(0, 0), (1, 16), (16, 16), (17, 32), (256, 256)])
def test_base_only_and_adapters_have_shapes_of_their_own(largest, rank):
    assert shape_for(5, largest, 7) == DecodeShape(8, rank, 7)


def test_a_rank_beyond_all_shapes_has_none():
    assert shape_for(5, 257, 7) is None


def test_what_a_graph_reads_is_written_anew_in_every_part():
    arrays = DecodeArrays(DecodeShape(4, 16, 3), block_size=8, scratch_block=99)
    wide, narrow = (np.full(sum(sizes), 7777) for sizes in (arrays.wide_sizes, arrays.narrow_sizes))
    arrays.fill(wide, narrow, [
        DecodeRow(11, 17, [4, 6, 2], adapter=1), DecodeRow(12, 8, [5], adapter=0), DecodeRow(13, 9, [1, 3], adapter=1),
    ])  # fmt: skip
    tokens, positions, slots = np.split(wide, 3)
    contexts, tables, rows, owners, blocks = np.split(narrow, np.cumsum(arrays.narrow_sizes)[:-1])
    assert tokens.tolist() == [11, 12, 13, 0]
    assert positions.tolist() == [16, 7, 8, 0]
    assert slots.tolist() == [2 * 8, 5 * 8 + 7, 3 * 8, 99 * 8]  # the last row fills up: into the scratch block
    assert contexts.tolist() == [17, 8, 9, 1]
    tables = tables.reshape(4, 3)
    assert tables[0].tolist() == [4, 6, 2] and tables[2, :2].tolist() == [1, 3] and tables[3, 0] == 99
    assert rows.tolist() == [1, 0, 2, 0] and owners.tolist() == [0, 1, 1, -1]
    assert blocks.reshape(-1, 3).tolist() == [[0, 0, 1], [1, 1, 2], [0, 0, 0], [0, 0, 0]]
    arrays.fill(wide, narrow, [DecodeRow(1, 1, [0])])  # and nothing of that is left
    assert np.split(wide, 3)[2].tolist() == [0, 792, 792, 792]
    assert np.split(narrow, np.cumsum(arrays.narrow_sizes)[:-1])[3].tolist() == [-1] * 4
    assert np.split(narrow, np.cumsum(arrays.narrow_sizes)[:-1])[4].tolist() == [0] * 12
