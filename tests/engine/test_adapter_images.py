"""Host images, and page tables that follow what comes and goes: thousands of adapters known, hundreds resident."""

from __future__ import annotations

import random

import pytest
import torch

from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.host_image import HostImage, weights_bytes
from coserve.server.training.peft.lora import LoraPair

torch.set_num_threads(1)
PAGE = 32  # elements
SITES = {"q": (16, 24), "down": (50, 16)}


def adapter(seed: int, rank: int, scaling: float = 0.5) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraPair(*(torch.randn(rank, width, generator=generator) for width in widths), scaling)
        for name, widths in SITES.items()
    }


def pool_of_pages(pages: int, dtype: torch.dtype = torch.float32) -> AdapterPool:
    return AdapterPool.of(pages * PAGE * dtype.itemsize, PAGE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_loaded_as_its_weights_are(dtype):
    weights = adapter(1, 5, scaling=0.3)
    image = HostImage(weights, PAGE, dtype, pinned=False)
    pool = pool_of_pages(200, dtype)
    for key in ("a", "hole", "b", "gap"):  # what comes next lies in the holes that two of them leave
        pool.load(key, adapter(7, 1 + len(key)))
    pool.unload("hole")
    pool.unload("gap")
    assert pool.pages_wanted(image) == pool.pages_wanted(weights) == len(image.pages)
    assert weights_bytes(image) == len(image.pages) * pool.page_bytes
    pool.load("image", image)
    pool.load("weights", weights)
    for site in SITES:
        got, want = pool.tensors("image", site), pool.tensors("weights", site)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2] == 1.0
    pool.check()


def test_thousands_known_and_hundreds_resident():
    """The least recently used go; tables, whichever was asked for before, show who is there now and where."""
    rng = random.Random(5)
    known = {f"v{n}": adapter(n, rng.randint(1, 4)) for n in range(2000)}
    pool = pool_of_pages(3000)
    for turn in range(2500):
        key = f"v{rng.randrange(2000) if turn % 2 else int(rng.paretovariate(1.0)) % 2000}"
        pool.load(key, known[key])
        assert pool.bytes_used == sum(pool.pages_of(k) for k in pool.resident()) * pool.page_bytes
        if turn % 50 == 0:
            batch = rng.sample(pool.resident()[-20:], min(len(pool.resident()), 8))
            table = pool.page_table(batch, SITES)
            assert pool.page_table(batch, SITES) is table
            assert table.largest_rank == max(known[k]["q"].a.shape[0] for k in batch)
            for number, name in enumerate(batch):
                for nth, site in enumerate(SITES):
                    a, b, _ = table.at(nth).pair(0, number)
                    assert torch.equal(a, known[name][site].a) and torch.equal(b, known[name][site].b * 0.5)
    assert len(pool.resident()) > 200
    pool.check()


def test_a_table_is_forgotten_with_its_adapter():
    pool = pool_of_pages(60)
    pool.load("a", adapter(1, 2))
    pool.load("b", adapter(2, 2))
    before = pool.page_table(["a", "b"], SITES)
    pool.unload("a")
    pool.load("c", adapter(3, 1))
    pool.load("a", adapter(1, 2))
    after = pool.page_table(["a", "b"], SITES)
    assert after is not before
    assert torch.equal(after.at(0).pair(0, 0)[0], adapter(1, 2)["q"].a)
