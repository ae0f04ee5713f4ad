"""Adapters of any rank and width share pages without mixing, and come and go without leaving a trace."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pool import AdapterInUse, AdapterPool, PoolFull, default_page_elements
from coserve.server.engine.host_image import weights_bytes
from coserve.server.training.peft.lora import LoraPair

torch.set_num_threads(1)
PAGE = 40  # elements
WIDTHS = {"layers.0.q": (16, 24), "layers.0.down": (50, 16), "layers.1.q": (16, 24)}


def adapter(seed, rank=4, sites=tuple(WIDTHS), scaling=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {site: LoraPair(noise(rank, WIDTHS[site][0]), noise(rank, WIDTHS[site][1]), scaling) for site in sites}


def pool(pages, dtype=torch.float32):
    return AdapterPool.of(pages * PAGE * dtype.itemsize, PAGE, dtype)


def same(pool, key, weights, fold=True):
    for site, pair in weights.items():
        a, b, scaling = pool.tensors(key, site)
        want = pair.b * pair.scaling if fold else pair.b
        assert torch.equal(a, pair.a.to(pool.dtype)) and torch.equal(b, want.to(pool.dtype))
        assert scaling == (1.0 if fold else pair.scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adapters_of_mixed_ranks_read_back(dtype):
    pages = pool(200, dtype)
    loaded = {f"v{rank}": adapter(rank, rank, dtype=dtype) for rank in (1, 3, 8, 17)}
    loaded["one site"] = adapter(99, 5, ["layers.0.down"], dtype=dtype)
    for key, weights in loaded.items():
        pages.load(key, weights)
    for key, weights in loaded.items():
        same(pages, key, weights)
    assert pages.tensors("one site", "layers.0.q") is None
    assert pages.rank("v17", "layers.0.q") == 17
    pages.check()


def test_a_rank_costs_its_own_rows_only():
    pages = pool(200)
    pages.load("big", adapter(1, 16))
    used = pages.bytes_used
    small = adapter(2, 1)
    pages.load("small", small)
    want = sum(-(-n // PAGE) for pair in small.values() for n in (pair.a.numel(), pair.b.numel()))
    assert pages.pages_wanted(small) == want
    assert pages.bytes_used - used == want * PAGE * 4
    assert pages.room.free == 200 - pages.bytes_used // (PAGE * 4)
    assert default_page_elements(640) == 5120


def test_scattered_pages_read_back_and_are_overwritten():
    pages = pool(60)
    for n in range(20):  # three pages each
        pages.load(f"filler {n}", adapter(n, 2, ["layers.0.q"]), pinned=True)
    assert pages.room.free == 0
    for n in range(0, 20, 2):
        pages.unpin(f"filler {n}")
        pages.unload(f"filler {n}")
    weights = adapter(50, 7, ["layers.0.down"])  # nine pages for A: more than any hole has
    pages.load("scattered", weights, fold_scaling=False)
    entry = pages.tensors("scattered", "layers.0.down")[0]
    assert entry.untyped_storage().data_ptr() != pages.flat.untyped_storage().data_ptr(), "this case needs holes"
    same(pages, "scattered", weights, fold=False)
    new = adapter(51, 7, ["layers.0.down"])
    pages.overwrite("scattered", "layers.0.down", new["layers.0.down"].a, new["layers.0.down"].b)
    same(pages, "scattered", new, fold=False)
    for n in range(1, 20, 2):
        same(pages, f"filler {n}", adapter(n, 2, ["layers.0.q"]))
    pages.check()


def test_training_copies_keep_scaling_apart_and_follow_the_optimizer():
    pages = pool(100)
    pages.load("job:1", adapter(1), pinned=True, fold_scaling=False)
    same(pages, "job:1", adapter(1), fold=False)
    new = adapter(2)
    for site, pair in new.items():
        pages.overwrite("job:1", site, pair.a, pair.b)
    same(pages, "job:1", new, fold=False)
    with pytest.raises(ValueError, match=r"A is \[4, 16\] in the pool, got \[5, 16\]"):
        pages.overwrite("job:1", "layers.0.q", torch.zeros(5, 16), torch.zeros(5, 24))


def test_freed_pages_are_zero():
    pages = pool(100)
    pages.load("a", adapter(1))
    pages.unload("a")
    assert pages.bytes_used == 0
    assert not pages.flat.any()
    pages.check()


def test_the_least_recently_used_idle_adapter_goes():
    size = pool(100).pages_wanted(adapter(0))
    pages = pool(3 * size + 1)
    for key in "abc":
        pages.load(key, adapter(ord(key)))
    pages.acquire("a")
    pages.release("a")
    pages.load("d", adapter(4))
    assert pages.resident() == ["c", "a", "d"]
    pages.load("c", adapter(ord("c")))
    pages.load("e", adapter(5))
    assert pages.resident() == ["d", "c", "e"]
    same(pages, "e", adapter(5))
    pages.check()


def test_adapters_in_use_or_pinned_never_go():
    size = pool(100).pages_wanted(adapter(0))
    pages = pool(2 * size)
    pages.load("used", adapter(1))
    pages.load("pinned", adapter(2), pinned=True)
    pages.acquire("used")
    with pytest.raises(PoolFull, match=f"wants {size} pages .* 0 would fit") as error:
        pages.load("third", adapter(3))
    assert (error.value.pages_wanted, error.value.pages_available) == (size, 0)
    for key, reason in (("used", "used by 1 requests"), ("pinned", "pinned")):
        with pytest.raises(AdapterInUse, match=reason):
            pages.unload(key)
    pages.release("used")
    pages.load("third", adapter(3))
    assert pages.resident() == ["pinned", "third"]
    with pytest.raises(KeyError):
        pages.acquire("used")


def test_what_cannot_fit_evicts_nobody():
    pages = pool(30)
    pages.load("a", adapter(1, 1))
    with pytest.raises(PoolFull):
        pages.load("huge", adapter(2, 30))
    assert pages.resident() == ["a"]


def test_a_retired_adapter_goes_with_its_last_request():
    pages = pool(100)
    pages.load("a", adapter(1))
    pages.acquire("a")
    pages.acquire("a")
    assert not pages.retire("a")
    pages.release("a")
    assert "a" in pages
    pages.release("a")
    assert "a" not in pages
    assert pages.retire("a")
    pages.load("b", adapter(2), pinned=True)
    assert not pages.retire("b")
    pages.unpin("b")
    assert pages.bytes_used == 0
    pages.load("c", adapter(3))
    with pytest.raises(ValueError, match="more often"):
        pages.release("c")


def test_wrong_shapes_are_refused_before_anything_is_taken():
    pages = pool(100)
    for pair in (LoraPair(torch.zeros(2, 3), torch.zeros(3, 3)), LoraPair(torch.zeros(4), torch.zeros(4, 2))):
        with pytest.raises(ValueError, match="not \\[r, in\\]"):
            pages.load("bad", {"layers.0.q": pair})
    assert pages.bytes_used == 0
    with pytest.raises(ValueError, match="at least one page"):
        AdapterPool.of(10, PAGE, torch.float32)


def test_random_histories_never_mix_adapters():
    rng = random.Random(4)
    pages, held, expected = pool(60), [], {}
    for step in range(600):
        action = rng.random()
        if action < 0.5:
            key, rank = f"v{step}", rng.choice([1, 2, 3, 5, 9])
            weights = adapter(step, rank, rng.sample(list(WIDTHS), rng.randint(1, 3)))
            try:
                pages.load(key, weights)
            except PoolFull as error:
                assert error.pages_wanted > error.pages_available
                continue
            expected[key] = weights
        elif action < 0.7 and pages.resident():
            held.append(rng.choice(pages.resident()))
            pages.acquire(held[-1])
        elif held:
            pages.release(held.pop(rng.randrange(len(held))))
        assert set(held) <= set(pages.resident())
        if step % 10 == 0:
            for key in pages.resident():
                same(pages, key, expected[key])
            pages.check()


# ---------------------------------------------------------------------------------- the loader


def wait_for(loader, count=1):
    arrived, deadline = [], time.monotonic() + 60
    while len(arrived) < count and time.monotonic() < deadline:
        arrived += loader.poll()
        time.sleep(0.002)
    return arrived


def test_folders_are_read_beside_the_caller():
    gate, reads = threading.Event(), []

    def read(path):
        reads.append(path.name)
        gate.wait(60)
        return adapter(int(path.name))

    loader = AdapterLoader(read, 1 << 20)
    try:
        started = time.monotonic()
        for _ in range(3):
            loader.request("d1", Path("/adapters/1"))
        loader.request("d2", Path("/adapters/2"))
        assert loader.poll() == []
        assert time.monotonic() - started < 20, "a request waited for the disk"
        assert loader.pending("d1") and loader.busy
        gate.set()
        arrived = dict(wait_for(loader, 2))
        assert torch.equal(arrived["d2"]["layers.0.q"].a, adapter(2)["layers.0.q"].a)
        assert reads == ["1", "2"]
        assert not loader.pending("d1") and not loader.busy
        loader.request("d1", Path("/adapters/1"))
        assert [digest for digest, _ in loader.poll()] == ["d1"], "it was in the cache"
        assert reads == ["1", "2"]
    finally:
        loader.close()


def test_what_the_reader_raises_is_delivered_and_not_kept():
    def read(path):
        if path.name == "bad":
            raise ValueError("adapter_config.json: no field r")
        if path.name == "worse":
            raise RecursionError("deep json")
        return adapter(1)

    loader = AdapterLoader(read, 1 << 20)
    try:
        for name in ("bad", "worse", "good"):
            loader.request(name, Path(name))
        arrived = dict(wait_for(loader, 3))
        assert isinstance(arrived["bad"], ValueError) and isinstance(arrived["worse"], RecursionError)
        assert "layers.0.q" in arrived["good"]
        loader.request("bad", Path("good"))
        assert not isinstance(dict(wait_for(loader))["bad"], Exception), "a repaired folder can be asked for again"
    finally:
        loader.close()


def test_the_host_cache_stays_under_its_cap():
    reads = []

    def read(path):
        reads.append(path.name)
        return adapter(int(path.name))

    size = weights_bytes(adapter(1))
    loader = AdapterLoader(read, 2 * size + 1)
    try:
        for name in ("1", "2", "1", "3", "1", "2"):
            loader.request(name, Path(name))
            assert len(wait_for(loader)) == 1
            assert loader.cached_bytes <= 2 * size + 1
        assert reads == ["1", "2", "3", "2"]
        loader.forget("2")
        assert loader.cached_bytes == size
    finally:
        loader.close()


def test_an_adapter_larger_than_the_cache_is_delivered_all_the_same():
    loader = AdapterLoader(lambda path: adapter(1), 10)
    try:
        loader.request("d", Path("x"))
        assert len(wait_for(loader)) == 1
        assert loader.cached_bytes == 0
    finally:
        loader.close()
