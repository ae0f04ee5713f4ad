"""Which rows of a packed query read which cache slots, worked out once an iteration and shared by all layers.

Masks, slot indices and the grouping of decode rows depend only on the segments and on a layer's sliding
window, so a plan keeps them a window; with two kinds of layers they are built twice, not once a layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Decode rows are read as one padded batch: 16 contexts of 200 (4 heads of 256 on 1 K/V head, float32, two
# cores) take 0.52 ms so and 3.5 ms one by one. Beyond this many padded tokens a second call is cheaper.
_MOST_PADDING = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """The newest rows of one sequence: query rows [start, start + rows) are its last `rows` tokens."""

    start: int
    rows: int
    context: int  # tokens in the cache, these rows included
    blocks: Sequence[int]  # block table; block b holds slots [b * block_size, (b + 1) * block_size)


@dataclass(frozen=True, slots=True)
class Unit:
    """One attention call: `batch` sequences of `rows` query rows each, over `length` keys each (padded)."""

    batch: int
    rows: int
    length: int
    query: slice | Tensor  # which rows of the packed query: batch * rows of them
    slots: slice | Tensor  # which cache slots: batch * length of them; a slice is read as a view
    bias: Tensor | None  # [batch, 1, rows, length] of 0 and -inf, None where nothing is hidden
    causal: bool  # rows == length and plain causal masking, which needs no bias

    def covers(self, rows: int) -> bool:
        """Whether this call's query is all of a packed query of so many rows, in order."""
        return isinstance(self.query, slice) and self.query == slice(0, rows)


class AttentionPlan:
    """The segments of one packed forward."""

    def __init__(
        self, segments: Sequence[Segment], block_size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        for segment in segments:
            if not 0 < segment.rows <= segment.context <= len(segment.blocks) * block_size:
                raise ValueError(f"segment at row {segment.start}: {segment.rows} rows and {segment.context} tokens "
                                 f"do not fit {len(segment.blocks)} blocks of {block_size}")  # fmt: skip
        self.segments = tuple(segments)
        self._block_size = block_size
        self._dtype, self._device = dtype, device
        self._units: dict[int | None, tuple[Unit, ...]] = {}

    def units(self, window: int | None) -> tuple[Unit, ...]:
        """The calls that a layer with this sliding window (None: full attention) makes."""
        if window not in self._units:
            decodes = [segment for segment in self.segments if segment.rows == 1]
            units = [self._decode_unit(group, window) for group in _groups(decodes, window)]
            units += [self._prefill_unit(segment, window) for segment in self.segments if segment.rows > 1]
            self._units[window] = tuple(units)
        return self._units[window]

    def _decode_unit(self, group: Sequence[Segment], window: int | None) -> Unit:
        group = sorted(group, key=lambda s: s.start)  # neighbours are then read and written as one slice
        lengths = [_visible(segment, window) for segment in group]
        length = max(lengths)
        slots = self._slots(group[0], length) if len(group) == 1 else self._padded_slots(group, lengths)
        bias = None
        if min(lengths) < length:
            hidden = torch.arange(length)[None, :] >= torch.tensor(lengths)[:, None]
            bias = self._bias(hidden[:, None, None, :])
        starts = [segment.start for segment in group]
        first, last = starts[0], starts[-1]
        neighbours = last - first == len(group) - 1
        query = slice(first, last + 1) if neighbours else self._index(torch.tensor(starts))
        return Unit(len(group), 1, length, query, slots, bias, causal=False)

    def _prefill_unit(self, segment: Segment, window: int | None) -> Unit:
        length = _visible(segment, window)
        query = slice(segment.start, segment.start + segment.rows)
        slots = self._slots(segment, length)
        # Key j is visible to query i iff i - window < j <= i, counted in positions of the sequence.
        if segment.rows == length and (window is None or window >= length):
            return Unit(1, segment.rows, length, query, slots, None, causal=True)
        i = torch.arange(length - segment.rows, length)[:, None]
        j = torch.arange(length)[None, :]
        hidden = j > i
        if window is not None:
            hidden |= j <= i - window
        return Unit(1, segment.rows, length, query, slots, self._bias(hidden[None, None]), causal=False)

    def _bias(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -math.inf).to(self._device)

    def _index(self, index: Tensor) -> Tensor:
        return index.to(device=self._device, dtype=torch.int64)

    def _slots(self, segment: Segment, length: int) -> slice | Tensor:
        """The slots of the last `length` tokens: a slice where they are consecutive."""
        size, first = self._block_size, segment.context - length
        used = list(segment.blocks[first // size : -(-segment.context // size)])
        if all(after - before == 1 for before, after in itertools.pairwise(used)):
            start = used[0] * size + first % size
            return slice(start, start + length)
        return self._index(_token_slots(used, size, first % size, length))

    def _padded_slots(self, group: Sequence[Segment], lengths: Sequence[int]) -> Tensor:
        """[batch * longest] slots; padding repeats a sequence's own first visible slot, and the bias hides it."""
        size, longest = self._block_size, max(lengths)
        table = torch.empty(len(group), longest, dtype=torch.int64)
        for row, segment, length in zip(table, group, lengths, strict=True):
            first = segment.context - length
            used = list(segment.blocks[first // size : -(-segment.context // size)])
            row[:length] = _token_slots(used, size, first % size, length)
            row[length:] = row[0]
        return self._index(table.view(-1))


def _visible(segment: Segment, window: int | None) -> int:
    """How many of a segment's newest tokens any of its rows can see."""
    return segment.context if window is None else min(segment.context, window + segment.rows - 1)


def _token_slots(blocks: Sequence[int], size: int, offset: int, length: int) -> Tensor:
    slots = torch.tensor(blocks, dtype=torch.int64)[:, None] * size + torch.arange(size)[None, :]
    return slots.view(-1)[offset : offset + length]


def _groups(decodes: Sequence[Segment], window: int | None) -> list[list[Segment]]:
    """Decode segments of similar length together, longest first."""
    groups: list[list[Segment]] = []
    padding = longest = 0
    for segment in sorted(decodes, key=lambda s: -_visible(s, window)):
        length = _visible(segment, window)
        padding += longest - length
        if not groups or padding > _MOST_PADDING:
            groups.append([])
            padding, longest = 0, length
        groups[-1].append(segment)
    return groups
