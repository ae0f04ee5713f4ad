"""Paged attention against dense attention of each sequence alone, and against transformers' own functions."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from coserve.kernels.attention.plan import AttentionPlan, Segment
from coserve.kernels.attention.reference import paged_attention

torch.set_num_threads(1)
BLOCK = 4
BLOCKS = 96


def dense(q, k, v, scale, window=None, softcap=None, sinks=None):
    """q [T, Hq, D] are the last T positions of k [N, Hkv, D]; every step written out, head by head."""
    rows, heads, _ = q.shape
    length, group = k.shape[0], heads // k.shape[1]
    out = torch.zeros(rows, heads, v.shape[-1], dtype=q.dtype)
    for head in range(heads):
        for row in range(rows):
            i = length - rows + row
            visible = [j for j in range(length) if j <= i and (window is None or j > i - window)]
            scores = (k[visible, head // group] @ q[row, head]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].to(scores.dtype)])
            weights = torch.softmax(scores.to(torch.promote_types(q.dtype, torch.float32)), 0).to(q.dtype)
            out[row, head] = weights[: len(visible)] @ v[visible, head // group]
    return out


def ragged_batch(seed, heads, kv_heads, dim, value_dim, dtype, shapes, contiguous=False):
    """Sequences of (context, rows), in random order in the packed row, scattered over a cache full of noise."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keys, values = noise(BLOCKS * BLOCK, kv_heads, dim) * 50, noise(BLOCKS * BLOCK, kv_heads, value_dim) * 50
    free = list(range(BLOCKS))
    if not contiguous:
        rng.shuffle(free)
    rows = sum(count for _, count in shapes)
    query, segments, parts, start = noise(rows, heads, dim), [], [], 0
    for context, count in shapes:
        needed = -(-context // BLOCK)
        blocks, free = free[:needed], free[needed:]
        slots = torch.tensor([blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(context)])
        k, v = noise(context, kv_heads, dim), noise(context, kv_heads, value_dim)
        keys[slots], values[slots] = k, v
        segments.append(Segment(start, count, context, blocks))
        parts.append((query[start : start + count], k, v))
        start += count
    return query, keys, values, AttentionPlan(segments, BLOCK, dtype), parts


RAGGED = [(1, 1), (9, 1), (23, 9), (8, 8), (40, 1), (17, 1), (5, 2), (33, 16), (4, 1), (2, 1)]


@pytest.mark.parametrize("heads,kv_heads,dim,value_dim", [(4, 1, 16, 16), (4, 4, 8, 8), (6, 2, 8, 12)])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 512])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "both"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_ragged_batch_equals_each_sequence_alone(heads, kv_heads, dim, value_dim, window, extra, contiguous):
    query, keys, values, plan, parts = ragged_batch(
        heads * dim, heads, kv_heads, dim, value_dim, torch.float64, RAGGED, contiguous
    )
    softcap = 2.5 if extra in ("softcap", "both") else None
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64) if extra in ("sinks", "both") else None
    got = paged_attention(query, keys, values, plan, 0.3, sliding_window=window, softcap=softcap, sinks=sinks)
    want = torch.cat([dense(q, k, v, 0.3, window, softcap, sinks) for q, k, v in parts])
    assert (got - want).norm() / want.norm() < 1e-12


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_lower_precision_stays_near_float64(dtype, bound, softcap):
    query, keys, values, plan, parts = ragged_batch(5, 4, 2, 16, 16, dtype, RAGGED)
    got = paged_attention(query, keys, values, plan, 0.25, sliding_window=8, softcap=softcap)
    assert got.dtype == dtype
    want = torch.cat([dense(q.double(), k.double(), v.double(), 0.25, 8, softcap) for q, k, v in parts])
    assert (got.double() - want).norm() / want.norm() < bound


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_equals_transformers(window, softcap):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    query, keys, values, plan, parts = ragged_batch(9, 4, 2, 8, 8, torch.float64, RAGGED)
    got = paged_attention(query, keys, values, plan, 0.2, sliding_window=window, softcap=softcap)
    visible = (
        causal_mask_function if window is None else and_masks(causal_mask_function, sliding_window_overlay(window))
    )
    start = 0
    for q, k, v in parts:
        rows, length = q.shape[0], k.shape[0]
        allowed = torch.tensor(
            [[bool(visible(0, 0, torch.tensor(length - rows + i), torch.tensor(j))) for j in range(length)]
             for i in range(rows)]
        )  # fmt: skip
        mask = torch.zeros(1, 1, rows, length, dtype=torch.float64).masked_fill_(~allowed, -math.inf)
        module = SimpleNamespace(num_key_value_groups=2, training=False, is_causal=True)
        states = [x.transpose(0, 1)[None] for x in (q, k, v)]
        if softcap is None:
            want, _ = sdpa_attention_forward(module, *states, attention_mask=mask, scaling=0.2)
            bound = 1e-12
        else:  # eager softmax is float32 whatever the inputs are
            want, _ = eager_attention_forward(module, *states, mask, scaling=0.2, softcap=softcap)
            bound = 1e-6
        difference = got[start : start + rows] - want[0]
        assert difference.norm() / want.norm() < bound
        start += rows


def test_decode_reads_no_more_than_the_window():
    query, keys, values, plan, _ = ragged_batch(3, 2, 1, 8, 8, torch.float64, [(40, 1), (31, 1)])
    before = paged_attention(query, keys, values, plan, 0.3, sliding_window=8)
    assert {unit.length for unit in plan.units(8)} == {8}
    for segment in plan.segments:
        for token in range(segment.context - 8):
            slot = segment.blocks[token // BLOCK] * BLOCK + token % BLOCK
            keys[slot] = values[slot] = math.nan
    assert torch.equal(before, paged_attention(query, keys, values, plan, 0.3, sliding_window=8))


def test_nothing_of_other_sequences_is_read():
    query, keys, values, plan, parts = ragged_batch(7, 4, 2, 8, 8, torch.float64, RAGGED)
    mine = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool)
    for segment in plan.segments:
        for token in range(segment.context):
            mine[segment.blocks[token // BLOCK] * BLOCK + token % BLOCK] = True
    keys[~mine] = values[~mine] = math.nan
    got = paged_attention(query, keys, values, plan, 0.3)
    want = torch.cat([dense(q, k, v, 0.3) for q, k, v in parts])
    assert (got - want).norm() / want.norm() < 1e-12


def test_padding_reads_the_sequence_itself():
    cache = torch.full((BLOCKS * BLOCK, 1, 8), math.nan)
    cache[12:20] = cache[40:60] = 1.0
    plan = AttentionPlan([Segment(0, 1, 17, range(10, 15)), Segment(1, 1, 6, [4, 3])], BLOCK, torch.float32)
    assert [unit.batch for unit in plan.units(None)] == [2]
    assert paged_attention(torch.ones(2, 1, 8), cache, cache, plan, 0.3).isfinite().all()


def test_consecutive_blocks_are_read_as_a_view():
    plan = AttentionPlan([Segment(0, 1, 11, [3, 4, 5])], BLOCK, torch.float32)
    (unit,) = plan.units(None)
    assert unit.slots == slice(12, 23)
    assert unit.bias is None
    assert plan.units(None) is plan.units(None)


def test_a_segment_that_does_not_fit_its_blocks_is_refused():
    with pytest.raises(ValueError, match="2 blocks of 4"):
        AttentionPlan([Segment(0, 1, 9, [0, 1])], BLOCK, torch.float32)
