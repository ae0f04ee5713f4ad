"""Reuse of K/V blocks between sequences that begin with the same tokens, and the one door to all blocks.

A block is known by a SHA-256 chain over (salt, adapter version, all token ids up to its end), so equal keys
mean equal content for one tenant salt and one immutable version, never for a name. Only full blocks whose
K/V has been computed are entered, and K/V of training rows never is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from coserve.server.engine.kv_cache import BlockAllocator, OutOfBlocks, SequenceBlocks


def root_hash(salt: str, version: str) -> bytes:
    """The chain's start. Lengths are part of it, so that no two (salt, version) pairs run together."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (salt, version)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCache:
    """Block hashes → blocks. Holds one reference of its own on every block it knows.

    A block is evictable while that reference is the only one; the least recently used goes first.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._blocks: dict[bytes, int] = {}
        self._entries: dict[int, tuple[bytes, str]] = {}  # block -> (hash, version)
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._limits: dict[str, int] = {}  # owner -> blocks
        self._owners: dict[int, str] = {}  # of known blocks, where the owner has a limit
        self._evictable_of: dict[str, OrderedDict[int, None]] = {}  # owner -> blocks, likewise

    def limit(self, owner: str, blocks: int | None) -> None:
        """From now on keep at most so many evictable blocks of an owner; None: no limit. What is there stays."""
        if blocks is not None:
            self._limits[owner] = blocks
            self._evictable_of.setdefault(owner, OrderedDict())
        elif owner in self._limits:
            del self._limits[owner], self._evictable_of[owner]
            self._owners = {block: other for block, other in self._owners.items() if other != owner}

    def __len__(self) -> int:
        return len(self._blocks)

    def knows(self, block: int) -> bool:
        return block in self._entries

    @property
    def evictable(self) -> int:
        return len(self._evictable)

    @property
    def blocks(self) -> list[int]:
        return list(self._entries)

    def match(self, salt: str, version: str, token_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """The known blocks that `token_ids` begins with, and the chain's hash at their end.

        Never all of the tokens: the last one has to run to give logits.
        """
        size = self._block_size
        parent = root_hash(salt, version)
        found: list[int] = []
        for index in range(max(len(token_ids) - 1, 0) // size):
            key = block_hash(parent, token_ids[index * size : (index + 1) * size])
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
            parent = key
        return found, parent

    def acquire(self, block: int) -> None:
        """A sequence takes a reference on a known block."""
        self._allocator.share(block)
        self._keep(block)

    def released(self, block: int) -> None:
        """A sequence has dropped its reference on a block, known or not."""
        if block in self._entries and self._allocator.references(block) == 1:
            self._evictable[block] = None
            self._evictable.move_to_end(block)
            self._held_to_limit(block)

    def _held_to_limit(self, block: int) -> None:
        """`block` has become evictable: if its owner has too many of those now, its least recently used one goes."""
        owner = self._owners.get(block)
        if owner is not None:
            own = self._evictable_of[owner]
            own[block] = None
            own.move_to_end(block)
            if len(own) > self._limits[owner]:
                oldest = next(iter(own))
                self._keep(oldest)
                self._drop(oldest)

    def _keep(self, block: int) -> None:
        """`block` is no longer evictable."""
        self._evictable.pop(block, None)
        owner = self._owners.get(block)
        if owner is not None:
            self._evictable_of[owner].pop(block, None)

    def insert(self, key: bytes, version: str, block: int, owner: str = "") -> None:
        """Enter a full block whose K/V has been computed; of two equal blocks the first stays the known one."""
        if key in self._blocks or block in self._entries:
            return
        self._allocator.share(block)
        self._blocks[key] = block
        self._entries[block] = (key, version)
        if owner in self._limits:
            self._owners[block] = owner

    def evict(self, count: int) -> int:
        """Free up to `count` unreferenced blocks, least recently used first; returns how many."""
        freed = 0
        while freed < count and self._evictable:
            block = next(iter(self._evictable))
            self._keep(block)
            self._drop(block)
            freed += 1
        return freed

    def clear(self, version: str | None = None) -> None:
        """Forget every block of `version` (None: of all). Running sequences keep the blocks they hold."""
        for block, (_, held) in list(self._entries.items()):
            if version is None or held == version:
                self._keep(block)
                self._drop(block)

    def _drop(self, block: int) -> None:
        key, _ = self._entries.pop(block)
        del self._blocks[key]
        self._owners.pop(block, None)
        self._allocator.free(block)


class Borrower(Protocol):
    """Who took blocks (`BlockManager.take`), and gives some back when they are wanted."""

    @property
    def spare_blocks(self) -> int:
        """That it could give back at once."""

    def give_way(self, blocks: int) -> None:
        """Give back at least so many of them."""


class BlockManager:
    """Allocator and prefix cache behind one door: admit → (grow → commit)* → release."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._allocator = BlockAllocator(num_blocks)
        self.prefix_cache = PrefixCache(self._allocator, block_size)
        self.borrower: Borrower | None = None
        # One sequence's hope to grow must not push all the others apart.
        self._most_ahead = num_blocks // 16

    @property
    def free_blocks(self) -> int:
        """Blocks that `grow` can hand out: those of nobody, and what the borrower would give back."""
        return self.unheld_blocks + (self.borrower.spare_blocks if self.borrower is not None else 0)

    @property
    def unheld_blocks(self) -> int:
        """Free ones, and cached ones that no sequence holds."""
        return self._allocator.free_blocks + self.prefix_cache.evictable

    def admit(
        self,
        token_ids: Sequence[int],
        salt: str,
        version: str,
        *,
        expected_tokens: int = 0,
        reuse: bool = True,
        owner: str = "",
    ) -> SequenceBlocks:
        """Begin a sequence: its known prefix is shared, nothing is allocated yet.

        Args:
            token_ids: prompt, and what was generated before a preemption.
            version: adapter version digest, "" for the base model.
            expected_tokens: how long the sequence may become, a hint for where to place it.
            reuse: False runs every token (for log-probabilities of the prompt).
            owner: the tenant in whose share of the prefix cache the sequence's blocks count.
        """
        found, parent = self.prefix_cache.match(salt, version, token_ids) if reuse else ([], root_hash(salt, version))
        for block in found:
            self.prefix_cache.acquire(block)
        cached = len(found) * self.block_size
        return SequenceBlocks(self.block_size, found, cached, cached, expected_tokens, parent, owner=owner)

    def blocks_wanted(self, sequence: SequenceBlocks, tokens: int) -> int:
        """How many more blocks the sequence needs before it can compute `tokens` more tokens."""
        return max(0, -(-(sequence.length + tokens) // self.block_size) - len(sequence.blocks))

    def can_grow(self, sequence: SequenceBlocks, tokens: int) -> bool:
        return self.blocks_wanted(sequence, tokens) <= self.free_blocks

    def grow(self, sequence: SequenceBlocks, tokens: int) -> None:
        """Give the sequence slots for `tokens` more tokens.

        Raises:
            OutOfBlocks: the sequence is as it was.
        """
        wanted = self.blocks_wanted(sequence, tokens)
        if not wanted:
            return
        if wanted > self.free_blocks:
            raise OutOfBlocks(wanted, self.free_blocks)
        expected = -(-sequence.expected_tokens // self.block_size)
        ahead = min(self._most_ahead, max(0, expected - len(sequence.blocks) - wanted))
        # Evicting what the sequence will want soon, too, gives it a run to grow into.
        target = wanted if sequence.blocks else wanted + ahead
        self.prefix_cache.evict(target - self._allocator.free_blocks)
        self._make_room(wanted)
        near = sequence.blocks[-1] if sequence.blocks else None
        sequence.blocks += self._allocator.allocate(wanted, near, ahead)

    def commit(self, sequence: SequenceBlocks, version: str, token_ids: Sequence[int]) -> None:
        """The K/V of `token_ids`, the sequence's next tokens, has been written: count them, enter full blocks."""
        if sequence.length + len(token_ids) > sequence.capacity:
            raise ValueError(f"{len(token_ids)} tokens committed to a sequence with room for "
                             f"{sequence.capacity - sequence.length}: call grow first")  # fmt: skip
        size = self.block_size
        sequence.pending += token_ids
        sequence.length += len(token_ids)
        done = 0
        while len(sequence.pending) - done >= size:
            full = sequence.pending[done : done + size]
            done += size
            sequence.parent = block_hash(sequence.parent, full)
            index = (sequence.length - (len(sequence.pending) - done)) // size - 1
            self.prefix_cache.insert(sequence.parent, version, sequence.blocks[index], sequence.owner)
        del sequence.pending[:done]

    def release(self, sequence: SequenceBlocks) -> None:
        """Give all blocks back; what the prefix cache knows stays readable until it is evicted. Idempotent."""
        if sequence.blocks:
            self._allocator.forget_ahead(sequence.blocks[-1])
        # Tail first: the end of a prompt is worth less to others than its beginning.
        for block in reversed(sequence.blocks):
            self._allocator.free(block)
            self.prefix_cache.released(block)
        sequence.blocks.clear()
        sequence.pending.clear()
        sequence.length = 0

    def take(self, count: int, *, last: bool = False) -> list[int]:
        """Blocks for what is no sequence, consecutive ones where there are any (`last`: the highest); cached ones go as
        for sequences.

        Raises:
            OutOfBlocks: nothing was taken.
        """
        if count > self.free_blocks:
            raise OutOfBlocks(count, self.free_blocks)
        self._make_room(count)
        return sorted(self._allocator.allocate(count, last=last))

    def _make_room(self, count: int) -> None:
        """Free so many blocks, of the `free_blocks` there are: what is cached goes before what is lent."""
        self.prefix_cache.evict(count - self._allocator.free_blocks)
        if self.borrower is not None and count > self._allocator.free_blocks:
            self.borrower.give_way(count - self._allocator.free_blocks)

    def give(self, blocks: Iterable[int]) -> None:
        """Give back what `take` gave."""
        for block in blocks:
            self._allocator.free(block)

    def shared_blocks(self, sequence: SequenceBlocks) -> int:
        """How many of the sequence's blocks other sequences hold too."""
        known = self.prefix_cache.knows
        return sum(self._allocator.references(block) - known(block) > 1 for block in sequence.blocks)

    def check(self, live: Iterable[SequenceBlocks], taken: Iterable[Sequence[int]] = ()) -> None:
        """Raise RuntimeError unless every reference is accounted for by the `live` sequences, the cache, and what was
        `taken`."""
        self._allocator.check([*(sequence.blocks for sequence in live), *taken, self.prefix_cache.blocks])
