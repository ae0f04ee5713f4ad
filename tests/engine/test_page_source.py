"""Adapters in blocks of the K/V cache: they are read as written, nobody else's slots change, and they give way."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from coserve.server.engine.adapter_pool import AdapterPool, PoolFull
from coserve.server.engine.kv_cache import KVCache, LayerShape, OutOfBlocks
from coserve.server.engine.page_source import BlockPages, OwnPages, laid_out
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.training.peft.lora import LoraPair

pytestmark = pytest.mark.usefixtures("one_thread")

UNLIKE = (LayerShape(2, 16, 8), LayerShape(1, 48, 48), LayerShape(3, 8, 24))
ALIKE = (LayerShape(2, 16, 16),) * 3
WIDTHS = {"q": (64, 32), "down": (100, 64), "up": (64, 200)}


def adapter(seed: int, rank: int = 4) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraPair(*(torch.randn(rank, width, generator=generator) for width in both))
        for name, both in WIDTHS.items()
    }


class Store:
    """A K/V cache whose every slot knows its number, and a pool of at most `most` of its blocks."""

    def __init__(self, layers: tuple[LayerShape, ...], blocks: int, most: int, *, scratch: bool = False) -> None:
        self.manager = BlockManager(blocks, 16)
        self.cache = KVCache(layers, blocks, 16, torch.float32, scratch=scratch)
        self.source = BlockPages(self.cache, self.manager, most, 512)
        self.pool = self.manager.borrower = AdapterPool(self.source)

    def paint(self, blocks: list[int]) -> None:
        """The keys and values of these blocks say where they are."""
        for layer, (keys, values) in enumerate(zip(self.cache.keys, self.cache.values, strict=True)):
            for block in blocks:
                keys[block * 16 : block * 16 + 16] = 1000.0 * layer + block
                values[block * 16 : block * 16 + 16] = -1000.0 * layer - block

    def check_painted(self, blocks: list[int]) -> None:
        for layer, (keys, values) in enumerate(zip(self.cache.keys, self.cache.values, strict=True)):
            for block in blocks:
                assert (keys[block * 16 : block * 16 + 16] == 1000.0 * layer + block).all()
                assert (values[block * 16 : block * 16 + 16] == -1000.0 * layer - block).all()

    def check_read(self, key: str, weights: dict[str, LoraPair]) -> None:
        for site, pair in weights.items():
            a, b, _ = self.pool.tensors(key, site)
            assert torch.equal(a, pair.a) and torch.equal(b, pair.b)


@pytest.mark.parametrize("layers", [ALIKE, UNLIKE])
@pytest.mark.parametrize("scratch", [False, True])
def test_pages_of_a_block_are_all_of_it_and_nothing_else(layers, scratch):
    store = Store(layers, 6, 6, scratch=scratch)
    elements, cache = store.source.page_elements, store.cache
    assert store.source.unit_pages * elements * 4 == cache.block_bytes
    for blocks in ([2], [1, 2, 4]):
        cache.flat.zero_()
        pages = [page for run in cache.page_runs(blocks, elements) for page in run]
        assert len(pages) == len(set(pages)) == len(blocks) * store.source.unit_pages
        cache.flat.view(-1, elements)[pages] = 1.0
        for block in range(6 + scratch):
            slots = slice(block * 16, block * 16 + 16)
            taken = [bool((t[slots] == 1).all()) for t in (*cache.keys, *cache.values)]
            left = [bool((t[slots] == 0).all()) for t in (*cache.keys, *cache.values)]
            assert all(taken) if block in blocks else all(left)


def test_pages_divide_rank_rows_and_blocks():
    alike, unlike = Store(ALIKE, 2, 2), Store(UNLIKE, 2, 2)
    assert (alike.source.page_elements, alike.source.unit_pages) == (512, 6)
    # Keys and values of 16 tokens take 512, 256; 768, 768; 384 and 1,152 elements.
    assert (unlike.source.page_elements, unlike.source.unit_pages) == (128, 30)


def test_large_tensors_lie_in_one_run_and_small_ones_fill_up():
    runs = [range(5), range(10, 16), range(20, 23)]
    placed = laid_out([3, 6, 2, 3], runs)
    assert placed == ((0, 1, 2), (10, 11, 12, 13, 14, 15), (3, 4), (20, 21, 22))
    split = laid_out([4, 4, 4], runs)
    assert split[:2] == ((0, 1, 2, 3), (10, 11, 12, 13)) and split[2] == (4, 14, 15, 20)


@pytest.mark.parametrize("layers", [ALIKE, UNLIKE])
def test_adapters_and_sequences_leave_each_other_alone(layers):
    store = Store(layers, 60, 40)
    holes = store.manager.take(60)
    store.manager.give(holes[1::3])  # scattered blocks for the first, whole runs for the others
    store.manager.give(holes[2::3])
    others = holes[::3]
    store.paint(others)
    for number, rank in enumerate((1, 5, 4)):
        store.pool.load(f"v{number}", adapter(number, rank))
    for number, rank in enumerate((1, 5, 4)):
        store.check_read(f"v{number}", adapter(number, rank))
    store.check_painted(others)
    store.pool.overwrite("v1", "q", *(t * 2 for t in (adapter(1, 5)["q"].a, adapter(1, 5)["q"].b)))
    store.check_painted(others)
    for key in store.pool.resident():
        store.pool.unload(key)
    store.check_painted(others)
    store.manager.give(others)
    store.manager.check([])
    left = [block for block in range(60) if block not in others]
    for tensor in (*store.cache.keys, *store.cache.values):
        assert not tensor.view(60, -1)[left].any(), "nothing of an adapter is left to the next sequence"


def test_a_run_of_blocks_is_read_without_a_copy():
    store = Store(ALIKE, 60, 40)
    store.pool.load("v", adapter(3))
    for site in WIDTHS:
        for tensor in store.pool.tensors("v", site)[:2]:
            assert tensor.untyped_storage().data_ptr() == store.cache.flat.untyped_storage().data_ptr()


def test_terms_of_a_table_in_blocks_are_those_of_a_pool_of_its_own():
    store, own = Store(UNLIKE, 60, 60), AdapterPool(OwnPages(200, 512, torch.float32, "cpu"))
    garbage = store.manager.take(60)
    store.paint(garbage)
    store.manager.give(garbage)
    loaded = {"one": adapter(1, 3), "two": adapter(2, 7)}
    tables = []
    for pool in (store.pool, own):
        for key, weights in loaded.items():
            pool.load(key, weights)
        tables.append(pool.page_table(list(loaded), WIDTHS))
    for site in range(len(WIDTHS)):
        for number in range(2):
            mine, theirs = (table.at(site).pair(0, number) for table in tables)
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_writing_keys_between_a_forward_and_its_backward_is_no_change_of_an_adapter():
    store = Store(ALIKE, 60, 40)
    store.pool.load("v", adapter(3), pinned=True)
    a, b, _ = store.pool.tensors("v", "q")
    x = torch.randn(5, 64, requires_grad=True)
    y = (x @ a.T @ b).sum()
    (block,) = store.manager.take(1)
    slots = torch.arange(block * 16, block * 16 + 16)
    store.cache.write(0, slots, torch.ones(16, 2, 16), torch.ones(16, 2, 16))
    y.backward()  # raises where autograd saw what it kept change
    assert torch.allclose(x.grad, (a.T @ b).sum(1).expand(5, 64))


def test_idle_adapters_give_way_the_reserved_ones_last_and_others_do_not():
    store = Store(ALIKE, 30, 20)
    each = store.pool.pages_wanted(adapter(0)) // store.source.unit_pages
    for key in ("urgent", "later", "used", "old", "new"):
        store.pool.load(key, adapter(len(key)))
    store.pool.acquire("used")
    store.pool.reserve(["urgent", "later", "gone"])
    assert store.manager.free_blocks == 30 - each and store.manager.unheld_blocks == 30 - 5 * each
    taken = store.manager.take(30 - 5 * each)
    assert len(store.pool.resident()) == 5, "free blocks go first"
    for left in (["urgent", "later", "new", "used"], ["urgent", "later", "used"], ["urgent", "used"], ["used"]):
        taken += store.manager.take(1)
        assert store.pool.resident() == left
        taken += store.manager.take(each - 1)
        assert store.pool.resident() == left
    with pytest.raises(OutOfBlocks):
        store.manager.take(1)
    store.pool.release("used")
    assert store.manager.free_blocks == each
    store.manager.check([], [taken, *([r.units for r in store.pool._residents])])


def test_a_load_evicts_nobody_that_is_reserved():
    store = Store(ALIKE, 30, 8)
    each = store.pool.pages_wanted(adapter(0)) // store.source.unit_pages
    for key in ("urgent", "other"):
        store.pool.load(key, adapter(len(key)))
    store.pool.reserve(["urgent"])
    taken = store.manager.take(30 - 2 * each)
    assert store.pool.room.lacks(store.pool.pages_wanted(adapter(1))) == 2 * each
    store.pool.load("new", adapter(1))
    assert store.pool.resident() == ["urgent", "new"]
    store.pool.reserve(["urgent", "new"])
    with pytest.raises(PoolFull):
        store.pool.load("more", adapter(2))
    assert store.pool.room.lacks(store.pool.pages_wanted(adapter(2))) == 3 * each, "with theirs, which count as free"
    store.manager.give(taken)


def test_a_load_takes_no_more_than_its_part_and_leaves_what_streams_will_want():
    store = Store(ALIKE, 30, 20)
    each = store.pool.pages_wanted(adapter(0)) // store.source.unit_pages
    taken = store.manager.take(30 - each)
    store.pool.room.left_free = 1
    with pytest.raises(PoolFull):
        store.pool.load("v", adapter(1))
    assert store.pool.room.lacks(store.pool.pages_wanted(adapter(1))) == each + 1
    store.manager.give(taken[:1])
    store.pool.load("v", adapter(1), pinned=True)
    store.manager.give(taken[1:])
    while store.pool.pages_wanted(adapter(1)) <= store.pool.room.available:
        store.pool.load(f"v{len(store.pool.resident())}", adapter(1), pinned=True)
    assert store.pool.room.lacks(store.pool.pages_wanted(adapter(1))) == 0, "other adapters hold what it waits for"
    assert 20 - each < store.pool.room.used // store.source.unit_pages <= 20 and store.manager.free_blocks >= 10


def test_random_histories_of_sequences_steps_and_adapters_keep_the_books():
    rng = random.Random(11)
    store = Store(UNLIKE, 64, 30)
    sequences, steps, expected, held = [], [], {}, []
    for turn in range(1500):
        action = rng.random()
        if action < 0.25:
            sequence = store.manager.admit([turn] * rng.randint(1, 90), "s", "")
            tokens = rng.randint(1, 90)
            if store.manager.can_grow(sequence, tokens):
                store.manager.grow(sequence, tokens)
                store.manager.commit(sequence, "", [rng.randint(0, 3) for _ in range(tokens)])
                sequences.append(sequence)
        elif action < 0.45 and sequences:
            store.manager.release(sequences.pop(rng.randrange(len(sequences))))
        elif action < 0.55:
            count = rng.randint(1, 20)
            if count <= store.manager.free_blocks:
                steps.append(store.manager.take(count))
                store.paint(steps[-1])
        elif action < 0.65 and steps:
            store.manager.give(steps.pop(rng.randrange(len(steps))))
        elif action < 0.8:
            weights = adapter(turn, rng.choice([1, 2, 5]))
            fits = store.pool.pages_wanted(weights) <= store.pool.room.available
            try:
                store.pool.load(f"v{turn}", weights, fold_scaling=False)
                expected[f"v{turn}"] = weights
                assert fits
            except PoolFull:
                assert not fits
        elif action < 0.9 and store.pool.resident():
            held.append(rng.choice(store.pool.resident()))
            store.pool.acquire(held[-1])
        elif held:
            store.pool.release(held.pop(rng.randrange(len(held))))
        store.pool.reserve([key for key in store.pool.resident() if rng.random() < 0.2])
        units = [r.units for r in store.pool._residents]
        store.pool.check()
        store.manager.check(sequences, [*steps, *units])
        assert sum(map(len, units)) <= 30 and set(held) <= set(store.pool.resident())
        if turn % 25 == 0:
            for blocks in steps:
                store.check_painted(blocks)
            for key in store.pool.resident():
                store.check_read(key, expected[key])


def test_adapters_are_put_at_the_end_where_sequences_come_last():
    store = Store(ALIKE, 30, 20)
    sequence = store.manager.admit([1], "s", "")
    store.manager.grow(sequence, 40)
    store.pool.load("v", adapter(1))
    (resident,) = store.pool._residents
    assert resident.units[-1] == 29 and all(after - before == 1 for before, after in pairwise(resident.units))
    assert sequence.blocks == [0, 1, 2]
