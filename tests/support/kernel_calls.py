"""Every Triton kernel on random inputs: for tests that look at repetition and races, not at values.

As a program it makes each call once, for `compute-sanitizer` to watch. Imports Triton.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from kernel_device import fresh_seed, kernel_device, poisoned_memory
from lora_batches import batch, run
from paged_adapters import PagedAdapters
from torch import Tensor

from coserve.kernels.attention import Segment, paged_batch
from coserve.kernels.attention.paged import paged_attention
from coserve.kernels.attention.spans import KeySpan, span_batch
from coserve.kernels.attention.training import Score
from coserve.kernels.attention.varlen import VarlenAttention
from coserve.kernels.layer import function
from coserve.kernels.lora import Family

# Results and gradients of the same inputs again, every fresh buffer poisoned.
Call = Callable[[], list[Tensor]]


def lora(family: Family, device: torch.device, seed: int, times: int) -> Call:
    """Two sites of one input, three adapters and rows of none; long sums in pieces. One family has a backward."""
    sites = {"q": (256, 128), "k": (256, 40)}
    adapters = PagedAdapters([3, 40, 17], sites, torch.bfloat16, device, page_elements=128, seed=seed)
    triples = [(0, 9 * times, 2), (10 * times, 27 * times, 1), (27 * times, 28 * times, 0)]
    x, y, wanted = batch(29 * times, 256, 168, torch.bfloat16, device, seed)
    wanted = wanted if family is Family.GROUPED else None

    def call() -> list[Tensor]:
        out, gradients = run(adapters, triples, x, y, wanted, sites=2, family=family, chunk_rows=10)
        return [out, *gradients]

    return call


def paged(shapes: Sequence[tuple[int, int]], splits: int, device: torch.device, seed: int, times: int) -> Call:
    """Sequences of (context, rows), their blocks all over the cache."""
    blocks = [-(-context * times // 16) for context, _ in shapes]
    free = random.Random(seed).sample(range(sum(blocks)), sum(blocks))
    segments, row = [], 0
    for (context, rows), count in zip(shapes, blocks, strict=True):
        rows = rows if rows == 1 else rows * times
        segments.append(Segment(row, rows, context * times, [free.pop() for _ in range(count)]))
        row += rows
    cache = (16 * sum(blocks), 2, 64)
    query, keys, values = noise(device, seed, (row, 8, 64), cache, cache)

    def call() -> list[Tensor]:
        with poisoned_memory():
            return [paged_attention(query, keys, values, paged_batch(segments, 16, 4, device), 0.125, splits=splits)]

    return call


def training(device: torch.device, seed: int, times: int) -> Call:
    """A span behind a prefix and a short one, several query heads a K/V head."""
    spans = [KeySpan(0, 70 * times, 0, 90 * times), KeySpan(70 * times, 5, 90 * times, 5)]
    rows, keys = 70 * times + 5, 90 * times + 5
    leaves = noise(device, seed, (2, rows, 64), (1, keys, 64), (1, keys, 64))
    table = span_batch(spans, 128, device)
    return differentiated(lambda *qkv: VarlenAttention.apply(*qkv, table, Score(0.125, 60), None, None), leaves)


def norm(device: torch.device, seed: int, times: int) -> Call:
    x, weight = noise(device, seed, (7 * times, 130), (130,))
    return differentiated(lambda x: function.rms_norm(x, weight, 1e-5), [x])


def rope(device: torch.device, seed: int, times: int) -> Call:
    x, angles = noise(device, seed, (6 * times, 3, 96), (6 * times, 40))
    return differentiated(lambda x: function.rope(x, angles.cos(), angles.sin()), [x])


def gated(device: torch.device, seed: int, times: int) -> Call:
    return differentiated(
        lambda gate, up: function.gated(gate, up, "silu"), noise(device, seed, *[(5 * times, 1100)] * 2)
    )


CALLS: dict[str, Callable[[torch.device, int, int], Call]] = {
    "LoRA, grouped": partial(lora, Family.GROUPED),
    "LoRA, row by row": partial(lora, Family.PER_ROW),
    "paged attention, prompts": partial(paged, [(50, 40), (33, 20)], 1),
    "paged attention, decodes in pieces": partial(paged, [(190, 1), (65, 1), (17, 1)], 4),
    "training attention": training,
    "rms_norm": norm,
    "rope": rope,
    "gated": gated,
}


def noise(device: torch.device, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device) for shape in shapes]


def differentiated(compute: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """The result, and the gradients of half its squares' sum."""

    def call() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        with poisoned_memory():
            out = compute(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]

    return call


if __name__ == "__main__":
    device, seed = kernel_device(), fresh_seed()
    for made in CALLS.values():
        made(device, seed, 1)()
    if device.type == "cuda":
        torch.cuda.synchronize()
