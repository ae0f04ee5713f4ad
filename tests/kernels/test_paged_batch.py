"""A batch for the attention kernel: its tiles cover every row once."""

from __future__ import annotations

from coserve.kernels.attention import Segment, paged_batch

SEGMENTS = [
    Segment(0, 1, 9, [3, 1, 7]),
    Segment(1, 11, 15, [0, 2, 5, 4]),
    Segment(14, 1, 1, [6]),
    Segment(15, 2, 2, [8]),
]


def test_tiles_cover_every_row_once():
    batch = paged_batch(SEGMENTS, 4, group=16)
    assert batch.tile_rows == 4
    assert sorted(batch.prefill.tolist()) == [[1, 0], [1, 4], [1, 8], [3, 0]]
    assert batch.prefill.tolist()[0] == [1, 8]  # it sees most keys
    assert batch.decode.tolist() == [[0, 0], [2, 0]]
    assert batch.tables.tolist() == [[3, 1, 7, 0], [0, 2, 5, 4], [6, 0, 0, 0], [8, 0, 0, 0]]
    assert (batch.contexts.tolist(), batch.starts.tolist(), batch.counts.tolist()) == (
        [9, 15, 1, 2], [0, 1, 14, 15], [1, 11, 1, 2],
    )  # fmt: skip
    assert batch.longest_decode == 9
