"""Paged attention by Triton against the plain-torch reference in float64, at the same rounded inputs."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_device import fresh_seed, kernel_device, poisoned_memory, relative_error

from coserve.kernels.attention import AttentionPlan, Segment, paged_batch, reference
from coserve.kernels.attention.paged import paged_attention, splits_for

pytestmark = pytest.mark.gpu

# Leaving out one of the (at most 200) keys, or letting one more in, moves a row by about 1/sqrt(200) of itself.
BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BOTH = [torch.float32, torch.bfloat16]
# (context, rows): decode rows short and long, whole prompts, chunks that end inside a block, one row of a prompt.
RAGGED = [(1, 1), (70, 1), (33, 20), (16, 16), (129, 1), (17, 1), (5, 2), (100, 3), (2, 1)]


class Batch:
    """Sequences scattered over a cache whose other slots are NaN; packed rows in random order, with gaps."""

    def __init__(self, shapes, heads, kv_heads, dim, value_dim, dtype, device, seed, block_size=16):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        needed = [-(-context // block_size) for context, _ in shapes]
        free = list(range(sum(needed) + 5))
        rng.shuffle(free)
        self.shapes, self.group, self.block_size, self.device = shapes, heads // kv_heads, block_size, device
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        slots = (sum(needed) + 5) * block_size
        self.keys = torch.full((slots, kv_heads, dim), torch.nan, dtype=dtype)
        self.values = torch.full((slots, kv_heads, value_dim), torch.nan, dtype=dtype)
        for (context, _), table in zip(shapes, self.tables, strict=True):
            for first in range(0, context, block_size):
                own = slice(table[first // block_size] * block_size, None)
                count = min(block_size, context - first)
                self.keys[own][:count] = torch.randn(count, kv_heads, dim, generator=generator).to(dtype)
                self.values[own][:count] = torch.randn(count, kv_heads, value_dim, generator=generator).to(dtype)
        order = rng.sample(range(len(shapes)), len(shapes))
        self.starts, row = [0] * len(shapes), 1
        for s in order:
            self.starts[s] = row
            row += shapes[s][1] + rng.randrange(2)
        self.query = torch.randn(row + 2, heads, dim, generator=generator).to(dtype)
        self.sinks = torch.randn(heads, generator=generator)

    def segments(self):
        return [
            Segment(start, count, context, table)
            for (context, count), start, table in zip(self.shapes, self.starts, self.tables, strict=True)
        ]

    def kernel(self, scale, *, splits=None, sinks=False, **how):
        with poisoned_memory():
            batch = paged_batch(self.segments(), self.block_size, self.group, self.device)
            on_device = [t.to(self.device) for t in (self.query, self.keys, self.values)]
            sink = self.sinks.to(self.device) if sinks else None
            return paged_attention(*on_device, batch, scale, sinks=sink, splits=splits, **how).cpu()

    def oracle(self, scale, *, sinks=False, **how):
        plan = AttentionPlan(sorted(self.segments(), key=lambda s: s.start), self.block_size, torch.float64)
        tensors = [torch.nan_to_num(t.double()) for t in (self.query, self.keys, self.values)]
        return reference.paged_attention(*tensors, plan, scale, sinks=self.sinks.double() if sinks else None, **how)

    def worst_row(self, got, want):
        """The largest relative error of a row and head; rows of no sequence must be zero."""
        mine = torch.zeros(len(got), dtype=torch.bool)
        for start, (_, count) in zip(self.starts, self.shapes, strict=True):
            mine[start : start + count] = True
        assert not got[~mine].any()
        error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
        return float(error[mine].max())


HOW = {
    "plain": {},
    "window": {"sliding_window": 19},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 40, "softcap": 3.0, "sinks": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("splits", [1, 4])
def test_ragged_batch(how, splits):
    seed, device = fresh_seed(), kernel_device()
    batch = Batch(RAGGED, 4, 2, 16, 16, torch.float32, device, seed)
    got = batch.kernel(0.3, splits=splits, **HOW[how])
    assert batch.worst_row(got, batch.oracle(0.3, **HOW[how])) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads,kv_heads,dim,value_dim", [
    (4, 4, 64, 64), (8, 2, 128, 128), (7, 1, 80, 80), (4, 1, 256, 256), (6, 2, 192, 128),
])  # fmt: skip
def test_heads(dtype, heads, kv_heads, dim, value_dim):
    seed, device = fresh_seed(), kernel_device()
    batch = Batch([(150, 1), (3, 1), (60, 11)], heads, kv_heads, dim, value_dim, dtype, device, seed)
    how = {"sliding_window": 100, "sinks": True}
    got = batch.kernel(dim**-0.5, splits=2, **how)
    assert got.dtype == dtype
    assert batch.worst_row(got, batch.oracle(dim**-0.5, **how)) < BOUND[dtype]


@pytest.mark.parametrize("shapes", [[(1, 1)], [(200, 1)], [(90, 90)], []])
def test_batches_of_one_and_none(shapes):
    seed, device = fresh_seed(), kernel_device()
    batch = Batch(shapes, 2, 1, 16, 16, torch.float32, device, seed)
    got = batch.kernel(0.25)
    if not shapes:
        assert not got.any()
        return
    assert batch.worst_row(got, batch.oracle(0.25)) < BOUND[torch.float32]


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_other_block_sizes(block_size):
    seed, device = fresh_seed(), kernel_device()
    batch = Batch([(37, 1), (50, 9), (64, 1)], 4, 2, 16, 16, torch.float32, device, seed, block_size)
    got = batch.kernel(0.3, splits=2, sliding_window=33)
    assert batch.worst_row(got, batch.oracle(0.3, sliding_window=33)) < BOUND[torch.float32]


def test_splits_repeat_bit_for_bit_and_agree():
    seed, device = fresh_seed(), kernel_device()
    batch = Batch([(190, 1), (64, 1), (65, 1)], 4, 2, 16, 16, torch.bfloat16, device, seed)
    results = {splits: batch.kernel(0.3, splits=splits) for splits in (1, 2, 16)}
    assert torch.equal(batch.kernel(0.3, splits=16), results[16])
    for result in results.values():
        assert batch.worst_row(result, batch.oracle(0.3)) < BOUND[torch.bfloat16]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_scores_do_not_overflow():
    seed, device = fresh_seed(), kernel_device()
    batch = Batch([(70, 1), (40, 5)], 2, 1, 16, 16, torch.float32, device, seed)
    for how in ({}, {"softcap": 30.0}):  # softcap's exponential overflows to infinity, as it may
        got = batch.kernel(200.0, splits=2, **how)
        assert relative_error(got, batch.oracle(200.0, **how)) < 1e-3  # scores of 1e3 are known to 1e-4


@pytest.mark.parametrize("dtype", BOTH)
def test_the_bounds_have_teeth(dtype):
    """A key too many, a key too few, a neighbour's K/V head: all are seen."""
    seed, device = fresh_seed(), kernel_device()
    batch = Batch([(150, 1), (90, 20)], 4, 2, 32, 32, dtype, device, seed)
    got = batch.kernel(0.18, sliding_window=64)
    for wrong in (63, 65):
        assert batch.worst_row(got, batch.oracle(0.18, sliding_window=wrong)) > 3 * BOUND[dtype]
    right = batch.oracle(0.18, sliding_window=64)
    assert batch.worst_row(got, right) < BOUND[dtype]
    batch.keys = batch.keys.flip(1)
    assert batch.worst_row(got, batch.oracle(0.18, sliding_window=64)) > 3 * BOUND[dtype]


def test_splits_follow_the_shapes():
    assert [splits_for(programs, 1024) for programs in (8, 64, 264, 4096)] == [16, 8, 1, 1]
    assert [splits_for(1, length) for length in (1, 127, 128, 256)] == [1, 1, 2, 4]


def test_what_the_kernel_cannot_do_is_refused():
    device = kernel_device()
    batch = paged_batch([Segment(0, 1, 3, [0])], 16, 1, device)
    cache, query = torch.zeros(16, 1, 320, device=device), torch.zeros(1, 1, 320, device=device)
    with pytest.raises(ValueError, match="heads of 320 and 320 values: the kernel takes at most 256"):
        paged_attention(query, cache, cache, batch, 1.0)
    with pytest.raises(ValueError, match=r"query is torch\.float64"):
        paged_attention(query[..., :64].double(), cache[..., :64], cache[..., :64], batch, 1.0)
    with pytest.raises(ValueError, match="at row 4: 1 rows and 17 tokens do not fit 1 blocks of 16"):
        paged_batch([Segment(4, 1, 17, [0])], 16, 1)
