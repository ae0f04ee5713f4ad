"""Paged LoRA in groups of rows against the plain-torch reference in float64, at the same rounded weights."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from kernel_device import fresh_seed, kernel_device, relative_error
from lora_batches import BOUND, batch, ranges_of, rows_without, run, worst_range
from paged_adapters import PagedAdapters

from coserve.kernels.lora import Family, PagedTerms, RowRange, route
from coserve.kernels.lora.function import paged_lora_add
from coserve.kernels.lora.grouped import splits_for

pytestmark = pytest.mark.gpu

BOTH = [torch.float32, torch.bfloat16]
RANKS = [1, 5, 16, 17, 100, 256]  # adapter 2 gets no rows
MIXED = [(0, 1, 0), (3, 21, 3), (21, 21, 2), (21, 38, 1), (40, 45, 5), (57, 58, 0), (60, 63, 4), (64, 70, 3)]


@pytest.mark.parametrize("dtype,inputs,outputs,page", [
    (torch.float32, 200, 136, 96), (torch.bfloat16, 200, 136, 96),  # pages end anywhere in a row
    (torch.float32, 256, 384, 128), (torch.bfloat16, 256, 384, 128),  # tiles lie inside pages
    (torch.float16, 130, 256, 384),
])  # fmt: skip
def test_mixed_ranks_in_one_launch(dtype, inputs, outputs, page):
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters(RANKS, {"q": (inputs, outputs)}, dtype, device, page_elements=page, seed=seed)
    x, y, _ = batch(72, inputs, outputs, dtype, device, seed)
    got, _ = run(adapters, MIXED, x, y)
    want, _ = adapters.oracle(y, x, ranges_of(MIXED))
    assert worst_range(got, want, ranges_of(MIXED)) < BOUND[dtype]
    others = rows_without(ranges_of(MIXED), 72)
    assert torch.equal(got[others], y[others])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("ranks,inputs,outputs,page", [
    ((3, 40, 2, 17), 72, 40, 56), ((3, 40, 2, 17), 128, 256, 128), ((100, 256, 2, 1), 24, 16, 56),
])  # fmt: skip
def test_gradients(dtype, ranks, inputs, outputs, page):
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters(ranks, {"q": (inputs, outputs)}, dtype, device, page_elements=page, seed=seed)
    triples = [(1, 20, 1), (20, 21, 0), (24, 50, 3), (55, 61, 1)]
    x, y, wanted = batch(64, inputs, outputs, dtype, device, seed)
    got, grads = run(adapters, triples, x, y, wanted, chunk_rows=10)
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    assert worst_range(got, want, ranges_of(triples)) < BOUND[dtype]
    assert torch.equal(grads[0], wanted)
    assert not grads[1][rows_without(ranges_of(triples), 64)].any()
    for r in ranges_of(triples):
        assert relative_error(grads[1][r.start : r.end].cpu(), oracle[1][r.start : r.end]) < BOUND[dtype]
    first = 0
    for number, rank in enumerate(ranks):
        for got_rows, want_rows in zip(grads[2:], oracle[2:], strict=True):
            got_rows, want_rows = got_rows[first : first + rank].cpu(), want_rows[first : first + rank]
            if number != 2:  # which has no row
                assert relative_error(got_rows, want_rows) < BOUND[dtype]
            else:
                assert torch.equal(got_rows, torch.zeros_like(got_rows))
        first += rank
    assert all(g.dtype == torch.float32 for g in grads[2:])


@pytest.mark.parametrize("dtype", BOTH)
def test_sites_that_share_their_input_in_one_launch(dtype):
    seed, device = fresh_seed(), kernel_device()
    sites = {"q": (64, 96), "k": (64, 24), "v": (64, 40)}
    sites["unused"] = (64, 16)
    ranks = [{"q": 4, "k": 20, "v": 1}, {"k": 7}, {"q": 33, "v": 2}]
    adapters = PagedAdapters(ranks, sites, dtype, device, page_elements=80, seed=seed)
    triples = [(0, 9, 2), (11, 30, 0), (30, 33, 1)]
    x, y, wanted = batch(35, 64, 176, dtype, device, seed)
    got, grads = run(adapters, triples, x, y, wanted, sites=4)
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    assert worst_range(got, want, ranges_of(triples)) < BOUND[dtype]
    assert torch.equal(got[30:33, :96], y[30:33, :96])  # adapter 1 has no term at q
    assert torch.equal(got[:, 160:], y[:, 160:])
    assert [g.shape[0] for g in grads[-2:]] == [0, 0]
    for g, w in zip(grads[:-2], oracle[:-2], strict=True):
        assert relative_error(g.cpu(), w) < BOUND[dtype]


@pytest.mark.parametrize("rows,triples", [
    (1, [(0, 1, 1)]), (5, []), (5, [(2, 2, 0)]), (17, [(0, 17, 0)]), (33, [(0, 16, 1), (16, 33, 0)]),
])  # fmt: skip
def test_small_and_empty_batches(rows, triples):
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([9, 2], {"q": (48, 32)}, torch.float32, device, page_elements=40, seed=seed)
    x, y, wanted = batch(rows, 48, 32, torch.float32, device, seed)
    got, _ = run(adapters, triples, x, y)
    want, _ = adapters.oracle(y, x, ranges_of(triples))
    if not any(end > start for start, end, _ in triples):
        assert torch.equal(got, y)
        return
    assert worst_range(got, want, ranges_of(triples)) < BOUND[torch.float32]
    _, grads = run(adapters, triples, x, y, wanted)
    _, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    for g, w in zip(grads, oracle, strict=True):
        assert relative_error(g.cpu(), w) < BOUND[torch.float32]


def test_a_random_cut_into_ranges_and_blocks():
    seed, device = fresh_seed(), kernel_device()
    rng = random.Random(seed)
    ranks = [rng.randint(1, 80) for _ in range(4)]
    cuts = sorted(rng.sample(range(91), 13))
    triples = [(a, b, rng.randrange(4)) for a, b in itertools.pairwise(cuts) if rng.random() < 0.8]
    adapters = PagedAdapters(
        ranks, {"q": (72, 56)}, torch.float32, device, page_elements=rng.randint(9, 200), seed=seed
    )
    x, y, wanted = batch(90, 72, 56, torch.float32, device, seed)
    got, grads = run(
        adapters, triples, x, y, wanted, block_rows=rng.choice([16, 32, 64]), chunk_rows=rng.randint(5, 40)
    )
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    assert worst_range(got, want, ranges_of(triples)) < BOUND[torch.float32]
    for g, w in zip(grads, oracle, strict=True):
        assert relative_error(g.cpu(), w) < BOUND[torch.float32]


def test_long_sums_are_split_and_repeat_bit_for_bit():
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([8, 24], {"q": (1025, 264)}, torch.bfloat16, device, page_elements=1200, seed=seed)
    triples = [(0, 3, 1), (4, 6, 0)]
    x, y, wanted = batch(7, 1025, 264, torch.bfloat16, device, seed)
    routing = route(ranges_of(triples), 2, device=device)
    assert splits_for(routing, adapters.table().at(0), 1025) >= 4
    runs = [run(adapters, triples, x, y, wanted) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert torch.equal(runs[0][0], runs[1][0])
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    assert worst_range(runs[0][0], want, ranges_of(triples)) < BOUND[torch.bfloat16]
    for g, w in zip(runs[0][1], oracle, strict=True):
        assert relative_error(g.cpu(), w) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("family", Family)
def test_many_small_adapters_in_one_launch(family):
    """64 adapters of ranks 1 to 4, a row of each, in no order; gradients are the grouped family's."""
    seed, device = fresh_seed(), kernel_device()
    order, ranks = random.Random(seed).sample(range(64), 64), [1 + n % 4 for n in range(64)]
    adapters = PagedAdapters(ranks, {"q": (24, 16)}, torch.float32, device, page_elements=40, seed=seed)
    triples = [(row, row + 1, adapter) for row, adapter in enumerate(order)]
    x, y, wanted = batch(64, 24, 16, torch.float32, device, seed)
    wanted = wanted if family is Family.GROUPED else None
    got, grads = run(adapters, triples, x, y, wanted, family=family)
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    # Scalings go from 0.25 to 31.75: without the least of the terms a result is off by 1e-3.
    for g, w in zip([got, *grads], [want, *oracle], strict=True):
        assert relative_error(g.cpu(), w) < BOUND[torch.float32]


def test_blocks_without_rows_change_nothing():
    """As in a decode iteration of fixed shape: there are as many blocks as rows, and few of them are used."""
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([20], {"q": (512, 264)}, torch.float32, device, page_elements=1200, seed=seed)
    x, y, _ = batch(32, 512, 264, torch.float32, device, seed)
    routing, pages = route([RowRange(0, 32, 0)], 1, block_rows=16, device=device), adapters.table().at(0)
    padded = replace(routing, blocks=torch.cat([routing.blocks, torch.zeros_like(routing.blocks).repeat(64, 1)]))
    assert len(padded.blocks) == 130 and splits_for(padded, pages, 512) == splits_for(routing, pages, 512) == 4
    got, want = (paged_lora_add(y.clone(), x, PagedTerms(r, pages)) for r in (padded, routing))
    assert torch.equal(got, want) and not torch.equal(got, y)


def test_dropout_reaches_the_term_and_its_gradients():
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([4, 6], {"q": (40, 24)}, torch.float32, device, page_elements=33, seed=seed)
    triples = [(0, 7, 0), (9, 20, 1)]
    mask = (torch.rand(11, 40, generator=torch.Generator().manual_seed(seed)) > 0.4) / 0.6
    dropout = (None, lambda rows: rows * mask.to(rows))
    x, y, wanted = batch(21, 40, 24, torch.float32, device, seed)
    got, grads = run(adapters, triples, x, y, wanted, dropout=dropout)
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted, dropout)
    assert worst_range(got, want, ranges_of(triples)) < BOUND[torch.float32]
    for g, w in zip(grads, oracle, strict=True):
        assert relative_error(g.cpu(), w) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", BOTH)
def test_the_bounds_have_teeth(dtype):
    """One page read in another's place, one element of 2,048 rounded away, one row of A left out: all are seen."""
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([64], {"q": (128, 128)}, dtype, device, page_elements=64, seed=seed)
    triples = [(0, 16, 0)]
    x, y, _ = batch(16, 128, 128, dtype, device, seed)
    got, _ = run(adapters, triples, x, y)
    pair = adapters.pairs[0]["q"]
    for plant in ("swapped pages", "missing rank", "missing column"):
        before = pair.a.clone()
        if plant == "swapped pages":
            pair.a.view(-1, 64)[[0, 1]] = pair.a.view(-1, 64)[[1, 0]]
        elif plant == "missing rank":
            pair.a[63] = 0
        else:
            pair.a[:, 127] = 0
        wrong, _ = adapters.oracle(y, x, ranges_of(triples))
        assert worst_range(got, wrong, ranges_of(triples)) > 3 * BOUND[dtype], plant
        pair.a.copy_(before)
    right, _ = adapters.oracle(y, x, ranges_of(triples))
    assert worst_range(got, right, ranges_of(triples)) < BOUND[dtype]


def test_what_does_not_fit_is_refused():
    device = kernel_device()
    adapters = PagedAdapters([2], {"q": (16, 8)}, torch.float32, device, page_elements=16, seed=1)
    terms = PagedTerms(route([RowRange(0, 2, 0)], 1, device=device), adapters.table().at(0))
    x, y, _ = batch(2, 16, 8, torch.float32, device, 1)
    with pytest.raises(ValueError, match=r"y is torch.float32, x torch.bfloat16, the pool torch.float32"):
        paged_lora_add(y, x.bfloat16(), terms)
    with pytest.raises(ValueError, match="y 9; the adapters' pairs are 16 wide on the input side and 8"):
        paged_lora_add(y.new_zeros(2, 9), x, terms)
