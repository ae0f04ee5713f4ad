"""Blocks are handed out once, in runs where possible; the cache gives back what was written."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from coserve.server.engine.kv_cache import (
    BlockAllocator,
    KVCache,
    LayerShape,
    OutOfBlocks,
    SequenceBlocks,
    block_bytes,
)

torch.set_num_threads(1)


def test_blocks_come_in_consecutive_runs():
    allocator = BlockAllocator(12)
    first = allocator.allocate(3)
    second = allocator.allocate(4)
    assert first == [0, 1, 2]
    assert second == [3, 4, 5, 6]
    allocator.free(1)
    assert allocator.allocate(2) == [7, 8]  # the hole of one block is left alone
    assert allocator.allocate(1) == [1]
    assert allocator.allocate(2, near=8) == [9, 10]


def test_a_sequence_grows_into_what_was_spoken_for():
    allocator = BlockAllocator(20)
    first = allocator.allocate(2, ahead=4)
    second = allocator.allocate(2, ahead=4)
    for sequence in (first, second) * 4:
        sequence += allocator.allocate(1, near=sequence[-1])
    assert first == [0, 1, 2, 3, 4, 5]
    assert second == [6, 7, 8, 9, 10, 11]


def test_a_hope_larger_than_the_space_still_keeps_some():
    allocator = BlockAllocator(10)
    first = allocator.allocate(2, ahead=20)
    assert allocator.allocate(1) == [7]
    assert allocator.allocate(5, near=first[-1]) == [2, 3, 4, 5, 6]
    allocator.forget_ahead(first[-1])


def test_what_a_finished_sequence_hoped_for_is_open_to_all():
    allocator = BlockAllocator(10)
    (block,) = allocator.allocate(1, ahead=5)
    allocator.forget_ahead(block)
    assert allocator.allocate(9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_what_is_spoken_for_is_still_free_for_others():
    allocator = BlockAllocator(8)
    allocator.allocate(2, ahead=6)
    assert allocator.free_blocks == 6
    assert allocator.allocate(2) == [6, 7]  # from the far end
    assert len(allocator.allocate(4)) == 4
    with pytest.raises(OutOfBlocks, match="1 K/V blocks wanted, 0 free"):
        allocator.allocate(1)


def test_scattered_blocks_are_found_when_there_is_no_run():
    allocator = BlockAllocator(9)
    allocator.allocate(9)
    for block in (0, 2, 4, 5, 8):
        allocator.free(block)
    assert sorted(allocator.allocate(5)) == [0, 2, 4, 5, 8]


def test_a_failed_allocation_takes_nothing():
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    with pytest.raises(OutOfBlocks):
        allocator.allocate(3, near=held[-1])
    assert allocator.free_blocks == 2
    allocator.check([held])


def test_shared_blocks_go_with_the_last_reference():
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate(1)
    allocator.share(block)
    assert not allocator.free(block)
    assert allocator.free(block)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(block)
    with pytest.raises(ValueError, match="cannot be shared"):
        allocator.share(block)


def test_the_check_finds_lost_and_doubled_references():
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    allocator.check([held])
    for wrong in ([], [held, held], [[*held, 3]]):
        with pytest.raises(RuntimeError, match="references counted"):
            allocator.check(wrong)


def test_block_bytes_is_what_the_tensors_take():
    layers = [LayerShape(2, 16, 16), LayerShape(1, 8, 12)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cache = KVCache(layers, 5, 4, dtype)
        taken = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
        assert taken == 5 * block_bytes(layers, 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("blocks", [[3, 4, 5], [6, 0, 2], [2, 1, 0], [1, 3, 2]])
def test_reads_give_back_what_was_written_in_order(dtype, blocks):
    cache = KVCache([LayerShape(2, 4, 4), LayerShape(1, 4, 6)], 8, 4, dtype)
    sequence = SequenceBlocks(4, blocks)
    written = []
    for start, end in ((0, 5), (5, 6), (6, 11)):
        slots = torch.tensor(sequence.slots(start, end))
        key, value = torch.randn(end - start, 1, 4).to(dtype), torch.randn(end - start, 1, 6).to(dtype)
        cache.write(1, slots, key, value)
        written.append((key, value))
    key, value = cache.read(1, sequence, 11)
    assert torch.equal(key, torch.cat([k for k, _ in written]))
    assert torch.equal(value, torch.cat([v for _, v in written]))
    consecutive = blocks == [3, 4, 5]
    assert (key.untyped_storage().data_ptr() == cache.keys[1].untyped_storage().data_ptr()) == consecutive
    assert not cache.keys[0].any(), "another layer was written"


def test_slots_outside_the_table_are_refused():
    sequence = SequenceBlocks(4, [7, 2])
    assert sequence.slots(3, 6) == [31, 8, 9]
    with pytest.raises(IndexError, match="8 slots"):
        sequence.slots(5, 9)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the kernel does not say what is resident")
def test_the_first_write_of_a_row_takes_small_pages():
    """Huge ones have to be cleared: 2 MiB for keys and for values of every layer, in an iteration that streams."""
    cache = KVCache([LayerShape(2, 64, 64)] * 16, 1024, 16, torch.float32)  # 16 MiB a layer
    slot, row = torch.tensor([5000]), torch.ones(1, 2, 64)
    cache.write(0, slot, row, row)
    before = _resident_bytes()
    for layer in range(1, 16):
        cache.write(layer, slot, row, row)
    assert _resident_bytes() - before < 15 * 2 * 2**20 / 8


def _resident_bytes() -> int:
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * mmap.PAGESIZE
