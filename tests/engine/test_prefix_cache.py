"""What may be reused, by whom, and what happens to it under pressure."""

from __future__ import annotations

import pytest

from coserve.server.engine.kv_cache import OutOfBlocks
from coserve.server.engine.prefix_cache import BlockManager, block_hash, root_hash

SIZE = 4


def run(manager, tokens, salt="tenant", version="", **options):
    """Admit a sequence and compute all of it."""
    sequence = manager.admit(tokens, salt, version, **options)
    manager.grow(sequence, len(tokens) - sequence.length)
    manager.commit(sequence, version, tokens[sequence.length :])
    return sequence


def test_a_second_sequence_reuses_full_blocks():
    manager = BlockManager(16, SIZE)
    first = run(manager, list(range(11)))
    assert first.cached_tokens == 0
    second = run(manager, [*range(8), 90, 91, 92, 93])
    assert second.cached_tokens == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    manager.check([first, second])


def test_a_full_hit_still_runs_the_last_token():
    manager = BlockManager(16, SIZE)
    run(manager, list(range(8)))
    assert manager.admit(list(range(8)), "tenant", "").cached_tokens == 4
    assert manager.admit(list(range(9)), "tenant", "").cached_tokens == 8
    assert manager.admit([0], "tenant", "").cached_tokens == 0
    assert manager.admit([], "tenant", "").cached_tokens == 0


def test_only_the_same_salt_version_and_history_match():
    manager = BlockManager(32, SIZE)
    tokens = list(range(12))
    run(manager, tokens, "a", "v1")
    assert manager.admit(tokens, "a", "v1").cached_tokens == 8
    for salt, version in (("b", "v1"), ("a", "v2"), ("a", ""), ("av", "1"), ("", "av1")):
        assert manager.admit(tokens, salt, version).cached_tokens == 0
    assert manager.admit([99, *tokens[1:]], "a", "v1").cached_tokens == 0
    assert manager.admit(tokens[4:], "a", "v1").cached_tokens == 0, "a block without its history"


def test_hashes_keep_their_parts_apart():
    assert root_hash("ab", "c") != root_hash("a", "bc")
    assert root_hash("\udc80", "") != root_hash("?", "")
    root = root_hash("", "")
    assert block_hash(root, [1, 2]) != block_hash(root, [2, 1])
    assert block_hash(block_hash(root, [1]), [2]) != block_hash(root, [1, 2])


def test_only_computed_blocks_can_be_found():
    manager = BlockManager(16, SIZE)
    first = manager.admit(list(range(12)), "t", "")
    manager.grow(first, 12)
    assert manager.admit(list(range(12)), "t", "").cached_tokens == 0
    manager.commit(first, "", list(range(7)))
    assert manager.admit(list(range(12)), "t", "").cached_tokens == 4
    manager.commit(first, "", [7])
    assert manager.admit(list(range(12)), "t", "").cached_tokens == 8


def test_generated_tokens_are_found_by_the_next_turn():
    manager = BlockManager(16, SIZE)
    sequence = run(manager, [1, 2, 3, 4, 5])
    for token in range(6, 13):
        manager.grow(sequence, 1)
        manager.commit(sequence, "", [token])
    manager.release(sequence)
    assert manager.admit([*range(1, 13), 77], "tenant", "").cached_tokens == 12


def test_released_blocks_count_as_free_and_stay_readable_until_needed():
    manager = BlockManager(4, SIZE)
    first = run(manager, list(range(9)))
    assert manager.free_blocks == 1
    manager.release(first)
    manager.release(first)
    assert manager.free_blocks == 4
    again = manager.admit(list(range(9)), "tenant", "")
    assert again.cached_tokens == 8
    assert manager.free_blocks == 2, "a block in use is not evictable"
    manager.release(again)
    other = run(manager, list(range(100, 116)))
    assert len(other.blocks) == 4
    assert manager.free_blocks == 0
    manager.check([other])
    manager.release(other)
    assert manager.admit(list(range(9)), "tenant", "").cached_tokens == 0


def test_the_least_recently_used_tail_goes_first():
    manager = BlockManager(6, SIZE)
    old = run(manager, list(range(9)))
    new = run(manager, list(range(50, 59)))
    manager.release(old)
    manager.release(new)
    blocked = run(manager, list(range(200, 212)))
    assert manager.admit(list(range(50, 59)), "tenant", "").cached_tokens == 8
    assert manager.admit(list(range(9)), "tenant", "").cached_tokens == 4
    manager.release(blocked)


def test_a_failed_growth_changes_nothing():
    manager = BlockManager(4, SIZE)
    first = run(manager, list(range(8)))
    second = manager.admit(list(range(100, 120)), "tenant", "")
    assert not manager.can_grow(second, 12)
    with pytest.raises(OutOfBlocks, match="3 K/V blocks wanted, 2 free"):
        manager.grow(second, 12)
    assert second.blocks == []
    assert manager.can_grow(second, 8)
    manager.grow(second, 8)
    manager.check([first, second])


def test_equal_blocks_computed_side_by_side_do_no_harm():
    manager = BlockManager(8, SIZE)
    a, b = manager.admit([1, 2, 3, 4, 5], "t", ""), manager.admit([1, 2, 3, 4, 5], "t", "")
    for sequence in (a, b):
        manager.grow(sequence, 5)
    for sequence in (a, b):
        manager.commit(sequence, "", [1, 2, 3, 4, 5])
    manager.check([a, b])
    manager.release(a)
    manager.release(b)
    assert manager.free_blocks == 8
    manager.check([])


def test_clearing_a_version_leaves_the_others_and_running_sequences():
    manager = BlockManager(16, SIZE)
    tokens = list(range(9))
    running, other = run(manager, tokens, version="v1"), run(manager, tokens, version="v2")
    held = list(running.blocks)
    manager.prefix_cache.clear("v1")
    assert manager.admit(tokens, "tenant", "v1").cached_tokens == 0
    assert manager.admit(tokens, "tenant", "v2").cached_tokens == 8
    assert running.blocks == held
    fresh = run(manager, list(range(300, 324)), version="v1")
    assert not set(fresh.blocks) & set(held)
    for sequence in (running, other, fresh):
        manager.release(sequence)


def test_without_reuse_every_token_runs_and_still_serves_others():
    manager = BlockManager(16, SIZE)
    run(manager, list(range(9)))
    again = run(manager, list(range(9)), reuse=False)
    assert again.cached_tokens == 0
    manager.release(again)


def test_commits_beyond_the_slots_are_refused():
    manager = BlockManager(4, SIZE)
    sequence = manager.admit([1, 2, 3, 4, 5], "t", "")
    manager.grow(sequence, 3)
    with pytest.raises(ValueError, match="call grow first"):
        manager.commit(sequence, "", [1, 2, 3, 4, 5])


def test_sequences_that_grow_side_by_side_stay_in_runs():
    manager = BlockManager(256, SIZE)
    sequences = [run(manager, [n, 1, 2], expected_tokens=43) for n in range(8)]
    for step in range(40):
        for sequence in sequences:
            manager.grow(sequence, 1)
            manager.commit(sequence, "", [step])
    assert all(sequence.run_start(sequence.length) is not None for sequence in sequences)


def test_a_tenants_share_of_the_cache_costs_its_own_oldest_blocks_first():
    manager = BlockManager(16, SIZE)
    manager.prefix_cache.limit("a", 2)

    def run(tenant, first, blocks):
        tokens = list(range(first, first + blocks * SIZE + 1))
        sequence = manager.admit(tokens, tenant, "", owner=tenant)
        found = sequence.cached_tokens // SIZE
        manager.grow(sequence, len(tokens) - sequence.cached_tokens)
        manager.commit(sequence, "", tokens[sequence.cached_tokens :])
        manager.release(sequence)
        manager.check([])
        return found

    assert run("b", 900, 3) == 0
    assert run("a", 100, 1) == run("a", 200, 1) == 0
    assert len(manager.prefix_cache) == 5
    assert run("a", 300, 3) == 0, "three blocks while it ran, two of them kept"
    assert len(manager.prefix_cache) == 5
    assert run("a", 300, 3) == 2 and run("a", 100, 1) == 0, "the beginning of a prompt is kept longest"
    assert run("b", 900, 3) == 3, "another tenant's blocks are all there"
    manager.prefix_cache.limit("a", None)
    assert run("a", 400, 4) == 0 and run("a", 400, 4) == 4
    manager.prefix_cache.clear()
    assert manager.free_blocks == 16 and len(manager.prefix_cache) == 0
