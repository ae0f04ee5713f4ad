"""Paged LoRA row by row, for small batches, against the plain-torch reference in float64, at the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernel_device import fresh_seed, kernel_device, poisoned_memory, relative_error
from lora_batches import BOUND, batch, ranges_of, rows_without, run, worst_range
from paged_adapters import PagedAdapters

from coserve.kernels.lora import Family, PagedTerms, RowRange, route
from coserve.kernels.lora.function import paged_lora_add
from coserve.kernels.lora.per_row import splits_for_all

pytestmark = pytest.mark.gpu

RANKS = [1, 5, 16, 17, 100, 256]  # adapter 2 gets no rows
MIXED = [(0, 1, 0), (3, 6, 3), (6, 6, 2), (6, 7, 1), (9, 12, 5), (13, 14, 0), (15, 16, 4), (17, 18, 3)]


@pytest.mark.parametrize("dtype,inputs,outputs,page", [
    (torch.float32, 200, 136, 96), (torch.bfloat16, 200, 136, 96),  # pages end anywhere in a row
    (torch.float32, 256, 384, 128), (torch.bfloat16, 256, 384, 128),  # tiles lie inside pages
    (torch.float16, 130, 256, 384),
])  # fmt: skip
def test_mixed_ranks_in_one_launch(dtype, inputs, outputs, page):
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters(RANKS, {"q": (inputs, outputs)}, dtype, device, page_elements=page, seed=seed)
    x, y, _ = batch(19, inputs, outputs, dtype, device, seed)
    got, _ = run(adapters, MIXED, x, y, family=Family.PER_ROW)
    want, _ = adapters.oracle(y, x, ranges_of(MIXED))
    assert worst_range(got, want, ranges_of(MIXED)) < BOUND[dtype]
    others = rows_without(ranges_of(MIXED), 19)
    assert torch.equal(got[others], y[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_that_share_their_input_in_one_launch(dtype):
    """Not every adapter targets all of them; and the grouped family takes gradients from these hidden values."""
    seed, device = fresh_seed(), kernel_device()
    sites = {"q": (64, 96), "k": (64, 24), "v": (64, 40), "unused": (64, 16)}
    ranks = [{"q": 4, "k": 20, "v": 1}, {"k": 7}, {"q": 33, "v": 2}]
    adapters = PagedAdapters(ranks, sites, dtype, device, page_elements=80, seed=seed)
    triples = [(0, 2, 2), (3, 4, 0), (4, 5, 1)]
    x, y, wanted = batch(6, 64, 176, dtype, device, seed)
    got, grads = run(adapters, triples, x, y, wanted, sites=4, family=Family.PER_ROW)
    want, oracle = adapters.oracle(y, x, ranges_of(triples), wanted)
    assert worst_range(got, want, ranges_of(triples)) < BOUND[dtype]
    assert torch.equal(got[4:5, :96], y[4:5, :96])  # adapter 1 has no term at q
    assert torch.equal(got[:, 160:], y[:, 160:])
    for g, w in zip(grads[:-2], oracle[:-2], strict=True):
        assert relative_error(g.cpu(), w) < BOUND[dtype]


@pytest.mark.parametrize("rows,triples", [
    (1, [(0, 1, 1)]), (5, []), (5, [(2, 2, 0)]), (17, [(0, 17, 0)]), (70, [(0, 33, 1), (33, 70, 0)]),
])  # fmt: skip
def test_one_row_none_and_more_than_a_program_takes(rows, triples):
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([9, 2], {"q": (48, 32)}, torch.float32, device, page_elements=40, seed=seed)
    x, y, _ = batch(rows, 48, 32, torch.float32, device, seed)
    got, _ = run(adapters, triples, x, y, family=Family.PER_ROW)
    want, _ = adapters.oracle(y, x, ranges_of(triples))
    if not any(end > start for start, end, _ in triples):
        assert torch.equal(got, y)
    else:
        assert worst_range(got, want, ranges_of(triples)) < BOUND[torch.float32]


def test_entries_that_only_fill_up_change_nothing():
    """As in a decode iteration of fixed shape: room for more rows and adapters and for larger ranks than there are."""
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([20, 3], {"q": (72, 40)}, torch.float32, device, page_elements=56, seed=seed)
    x, y, _ = batch(4, 72, 40, torch.float32, device, seed)
    ranges = [RowRange(0, 2, 1), RowRange(3, 4, 0)]
    routing, table = route(ranges, 2, device=device), adapters.table()
    rows, owners = F.pad(routing.rows, (0, 5)), F.pad(routing.owners, (0, 5), value=-1)
    room = replace(
        table, ranks=((32,) * 5,), index=F.pad(table.index, (0, 0, 0, 3)),
        scaling=F.pad(table.scaling, (0, 3), value=torch.nan), _views={},
    )  # fmt: skip
    with poisoned_memory():
        routing = replace(routing, adapters=5, rows=rows, owners=owners)
        got = paged_lora_add(y.clone(), x, PagedTerms(routing, room.at(0), family=Family.PER_ROW))
    want, _ = adapters.oracle(y, x, ranges)
    assert worst_range(got, want, ranges) < BOUND[torch.float32]
    assert torch.equal(got[2], y[2])


def test_long_sums_are_split_and_repeat_bit_for_bit():
    seed, device = fresh_seed(), kernel_device()
    adapters = PagedAdapters([8, 24], {"q": (1025, 264)}, torch.bfloat16, device, page_elements=1200, seed=seed)
    triples = [(0, 3, 1), (4, 6, 0)]
    x, y, _ = batch(7, 1025, 264, torch.bfloat16, device, seed)
    assert splits_for_all(adapters.table().at(0)) == 8
    got, again = (run(adapters, triples, x, y, family=Family.PER_ROW)[0] for _ in range(2))
    assert torch.equal(got, again)
    want, _ = adapters.oracle(y, x, ranges_of(triples))
    assert worst_range(got, want, ranges_of(triples)) < BOUND[torch.bfloat16]
