"""The paged K/V cache: which blocks are whose, and the tensors that the blocks number.

A block is `block_size` consecutive token slots; block b is slots [b*block_size, (b+1)*block_size) of every
layer. The allocator hands out numbers and counts references; it never looks at tensors, and the cache never
looks at counts. Blocks may also hold what training keeps of its rows (`row_pages`): for that the memory of a layer
is seen as *cells*, those of the keys and then those of the values. And they may hold adapters (`page_source`): for that
all memory is one row of equal pages, of which a block has some in the keys and some in the values of every layer.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor

_USED, _FREE, _SPOKEN_FOR = 0, 1, 2
_ANY_FREE = bytes.maketrans(bytes([_SPOKEN_FOR]), bytes([_FREE]))


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free; preempt a sequence or wait."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} K/V blocks wanted, {free} free: preempt a sequence or raise --kv-memory")
        self.wanted = wanted
        self.free = free


class BlockAllocator:
    """Reference-counted block numbers 0 … num_blocks-1.

    It prefers physically consecutive runs, because a sequence whose blocks are consecutive is read as a view
    instead of a gathered copy. A run may have blocks *spoken for* behind it, into which its owner is expected
    to grow: they are free, and others take them last.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a K/V cache needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._state = bytearray([_FREE]) * num_blocks
        self._references = [0] * num_blocks
        self._free = num_blocks

    @property
    def free_blocks(self) -> int:
        return self._free

    def references(self, block: int) -> int:
        return self._references[block]

    def can_allocate(self, count: int) -> bool:
        return count <= self._free

    def allocate(self, count: int, near: int | None = None, ahead: int = 0, *, last: bool = False) -> list[int]:
        """Take `count` blocks, each with one reference.

        Args:
            near: the last block of the sequence that grows; the new blocks follow it where they can.
            ahead: how many further blocks this sequence is likely to want behind the new ones.
            last: the highest that are free: for who holds them for long, apart from those that come and go.
        Raises:
            OutOfBlocks: fewer than `count` are free; nothing was taken.
        """
        if count > self._free:
            raise OutOfBlocks(count, self._free)
        blocks: list[int] = []
        if near is not None:
            following = near + 1
            while len(blocks) < count and following < self.num_blocks and self._state[following] != _USED:
                self._take(following)
                blocks.append(following)
                following += 1
        if len(blocks) < count:
            blocks += self._take_run(count - len(blocks), 0 if last else ahead, last)
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a block in use."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is free and cannot be shared")
        self._references[block] += 1

    def free(self, block: int) -> bool:
        """Drop a reference; True when it was the last one and the block is free again."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} was freed twice")
        self._references[block] -= 1
        if self._references[block]:
            return False
        self._state[block] = _FREE
        self._free += 1
        return True

    def forget_ahead(self, last: int) -> None:
        """The sequence that ends in block `last` will not grow: what was spoken for behind it is open to all."""
        following = last + 1
        while following < self.num_blocks and self._state[following] == _SPOKEN_FOR:
            self._state[following] = _FREE
            following += 1

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless the counts equal the references in `holders` (one list of blocks a holder)."""
        expected = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                expected[block] += 1
        for block, (want, have) in enumerate(zip(expected, self._references, strict=True)):
            if want != have or (have > 0) != (self._state[block] == _USED):
                raise RuntimeError(f"block {block}: {have} references counted, {want} held")
        if self._free != self._references.count(0):
            raise RuntimeError(f"{self._free} free blocks counted, {self._references.count(0)} are")

    def _take(self, block: int) -> None:
        self._state[block] = _USED
        self._references[block] = 1
        self._free -= 1

    def _take_run(self, count: int, ahead: int, last: bool) -> list[int]:
        """`count` free blocks in as few runs as a search by halves finds; the caller knows that they exist."""
        while True:
            run = bytes([_FREE]) * (count + ahead)
            start = self._state.rfind(run) if last else self._state.find(run)
            if start >= 0 or ahead == 0:
                break
            ahead //= 2
        if start < 0:
            # Only blocks that others hope to grow into: from the far end, which they reach last.
            start = self._state.translate(_ANY_FREE).rfind(bytes([_FREE]) * count)
        if start < 0:
            half = count // 2
            return self._take_run(count - half, 0, last) + self._take_run(half, 0, last)
        for block in range(start, start + count):
            self._take(block)
        for block in range(start + count, start + count + ahead):
            self._state[block] = _SPOKEN_FOR
        return list(range(start, start + count))


@dataclass(slots=True)
class SequenceBlocks:
    """One sequence's block table: token i lies in block `blocks[i // block_size]`."""

    block_size: int
    blocks: list[int] = field(default_factory=list)
    length: int = 0  # tokens whose K/V is in the cache
    cached_tokens: int = 0  # how many of them came from the prefix cache
    expected_tokens: int = 0  # how long the sequence may become: a hint for placement only
    parent: bytes = b""  # hash of the last full block (or of salt and version), for the prefix cache
    pending: list[int] = field(default_factory=list)  # token ids of the block that is not full yet
    owner: str = ""  # the tenant in whose share of the prefix cache its blocks count

    @property
    def capacity(self) -> int:
        return len(self.blocks) * self.block_size

    def slots(self, start: int, end: int) -> list[int]:
        """The cache slots of tokens [start, end)."""
        if not 0 <= start <= end <= self.capacity:
            raise IndexError(f"tokens {start}:{end} lie outside the {self.capacity} slots of this sequence")
        size = self.block_size
        return [self.blocks[token // size] * size + token % size for token in range(start, end)]

    def run_start(self, length: int) -> int | None:
        """The slot of token 0 if the first `length` tokens lie in consecutive slots, else None."""
        used = self.blocks[: -(-length // self.block_size)]
        if not used or used[-1] - used[0] != len(used) - 1:
            return None if used else 0
        if any(after - before != 1 for before, after in itertools.pairwise(used)):
            return None
        return used[0] * self.block_size


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps a token: keys [kv_heads, key_dim] and values [kv_heads, value_dim]."""

    kv_heads: int
    key_dim: int
    value_dim: int
    query_heads: int = 0  # that read them

    @property
    def cell(self) -> int:
        """Elements of a cell: a token's keys and its values are whole numbers of them."""
        return self.kv_heads * gcd(self.key_dim, self.value_dim)

    def key_cells(self, block_size: int) -> int:
        """Of one block."""
        return block_size * self.kv_heads * self.key_dim // self.cell

    def value_cells(self, block_size: int) -> int:
        return block_size * self.kv_heads * self.value_dim // self.cell


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: block_size × itemsize × Σ kv_heads × (key_dim + value_dim)."""
    return block_size * dtype.itemsize * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in layers)


class KVCache:
    """Keys and values of all layers, `keys[l]` and `values[l]`: [num_blocks*block_size, kv_heads, dim]."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        scratch: bool = False,
    ) -> None:
        """`scratch`: one block more, number `scratch_block`, that no allocator gives out."""
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_block = num_blocks
        self.dtype, self.device = dtype, torch.device(device)
        self._blocks = num_blocks + scratch
        slots = self._blocks * block_size
        widths = [s.kv_heads * (s.key_dim + s.value_dim) for s in self.layers]
        self.flat = _zeros(slots * sum(widths), dtype, self.device)  # all layers, one behind the other
        self.cells: list[Tensor] = []  # a layer's memory as [cells, elements of a cell]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for s, memory in zip(self.layers, self.flat.split([slots * width for width in widths]), strict=True):
            keys = slots * s.kv_heads * s.key_dim
            self.cells.append(memory.view(-1, s.cell))
            self.keys.append(memory[:keys].view(slots, s.kv_heads, s.key_dim))
            self.values.append(memory[keys:].view(slots, s.kv_heads, s.value_dim))

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.layers, self.block_size, self.dtype)

    # ------------------------------------------------------------------ as pages

    def page_elements(self, most: int) -> int:
        """The largest page that divides `most`, and the keys and the values of a block in every layer."""
        return gcd(most, *self._pieces)

    def page_runs(self, blocks: Iterable[int], page_elements: int) -> list[range]:
        """The pages of these blocks (ascending), as runs of consecutive numbers: page p is elements
        [p * page_elements, (p+1) * page_elements) of `flat`."""
        spans: list[list[int]] = []  # of consecutive blocks: first, end
        for block in blocks:
            if spans and spans[-1][1] == block:
                spans[-1][1] += 1
            else:
                spans.append([block, block + 1])
        runs, first = [], 0
        for piece in self._pieces:
            pages = piece // page_elements
            runs += [range(first + start * pages, first + end * pages) for start, end in spans]
            first += self._blocks * pages
        return runs

    @property
    def _pieces(self) -> list[int]:
        """Elements of one block's keys and of its values, layer by layer, as they lie in `flat`."""
        return [self.block_size * s.kv_heads * dim for s in self.layers for dim in (s.key_dim, s.value_dim)]

    # ------------------------------------------------------------------ as keys and values

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key [T, kv_heads, key_dim] and value [T, kv_heads, value_dim] at `slots` (int64 [T])."""
        self.keys[layer].index_copy_(0, slots, key.detach())
        self.values[layer].index_copy_(0, slots, value.detach())

    def read(self, layer: int, sequence: SequenceBlocks, length: int) -> tuple[Tensor, Tensor]:
        """Key [length, kv_heads, key_dim] and value of a sequence's first tokens; a view when they are consecutive."""
        keys, values = self.keys[layer], self.values[layer]
        start = sequence.run_start(length)
        if start is not None:
            return keys[start : start + length], values[start : start + length]
        index = torch.tensor(sequence.slots(0, length), dtype=torch.int64, device=keys.device)
        return keys.index_select(0, index), values.index_select(0, index)


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed: a slot that nobody wrote may be read where a mask hides it, and 0 × NaN is NaN.

    In the host's memory a page is taken when it is first written, so that a small use stays small. Small pages: the
    first write of a few rows in every layer would clear a huge page for each, up to 0.3 s in an iteration with streams.
    """
    if device.type != "cpu" or not count:
        return torch.zeros(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)  # which keeps the mapping as long as any view of it
