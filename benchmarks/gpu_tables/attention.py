"""Attention by itself, of one layer: training rows beside torch's own flash kernel, decode rows beside the copy rate.

Training rows are what a pass of the engine sees: whole sequences, or the rest of one whose earlier rows (the prefix)
stand in keys and values already. Forward and backward go through the engine's backend, so what it puts before a kernel
counts. FLOP are those the method needs: two products forward and four backward over the keys that a row sees. The
floor is these over the product rate; of decode rows it is the bytes of keys and values over the copy rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import ratio, say
from peers.torch_attention import OneByOne, OneCall
from torch import Tensor

from coserve.kernels.attention.plan import Segment
from coserve.kernels.attention.training import Score
from gpu_tables.bench import Bench
from gpu_tables.table import Table

_BLOCK = 16  # tokens of a block of the cache
_FORWARD, _BOTH = "forward", "forward and backward"


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows of one pass: `lengths` of its sequences, the first of which has a prefix of so many rows."""

    name: str
    lengths: tuple[int, ...]
    prefix: int = 0

    @property
    def pairs(self) -> int:
        """Of a row and a key that it sees."""
        return self.lengths[0] * self.prefix + sum(length * (length + 1) // 2 for length in self.lengths)


@dataclass(frozen=True, slots=True)
class Size:
    rows: tuple[Rows, ...]
    decode: tuple[tuple[int, int], ...]  # (sequences, tokens of each): more than a cache of the device holds
    times: int


FULL = Size(
    (
        Rows("one of 8192", (8192,)), Rows("four of 2048", (2048,) * 4),
        Rows("mixed", (3000, 1500, 1000, 900, 700, 500, 300, 150, 100, 42)),
        Rows("1024 after 7168", (1024,), prefix=7168), Rows("512 after 1536, 1500", (512, 1500), prefix=1536),
    ),
    ((1, 32768), (8, 8192), (32, 1024), (128, 1024)), 20,
)  # fmt: skip
TOY = Size((Rows("two of 24", (24, 24)), Rows("8 after 16, 20", (8, 20), prefix=16)), ((3, 40),), 2)


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    shape = f"{bench.geometry.heads} heads of {bench.geometry.head_dim} on {bench.geometry.kv_heads}"
    table = bench.table(
        "attention", f"Attention of one layer, {shape}",
        ["rows", "what", "coserve ms", "TFLOP/s", "floor ms", "÷ floor", "torch ms", "torch ÷ coserve",
         "they differ by"],
    )  # fmt: skip
    for rows in size.rows:
        if bench.attempt(table, rows.name, partial(_training, bench, rows, size.times, table)) is None:
            table.lack(rows.name, "training")
    for sequences, context in size.decode:
        name = f"{sequences} of {context}"
        seconds = bench.attempt(table, name, partial(_decode, bench, sequences, context, size.times))
        if seconds is None:
            table.lack(name, "decode")
            continue
        say(f"{name}, decode: {1e3 * seconds:.3f} ms")
        read = sequences * context * bench.geometry.kv_bytes(bench.dtype) / bench.geometry.layers
        floor = read / bench.copy_rate
        table.row(name, "decode", 1e3 * seconds, None, 1e3 * floor, seconds / floor, None, None, None)
    table.finish()


def _training(bench: Bench, rows: Rows, times: int, table: Table) -> bool:
    """The rows of one shape: forward, and forward and backward. True at its end."""
    inputs = _tensors(bench, rows)
    ours, torchs = Ours(bench, rows, *inputs), _torchs(inputs, rows, table)
    errors = [None, None] if torchs is None else _differences(ours.results(), torchs.results())
    for what, products, error in ((_FORWARD, 2, errors[0]), (_BOTH, 6, errors[1])):
        own = _seconds(bench, ours, what, times)
        other = None if torchs is None else _seconds(bench, torchs, what, times)
        flop = 2 * products * rows.pairs * bench.geometry.heads * bench.geometry.head_dim
        floor = flop / bench.product_rate
        say(f"{rows.name}, {what}: {1e3 * own:.3f} ms")
        table.row(
            rows.name, what, 1e3 * own, flop / own / 1e12, 1e3 * floor, own / floor, other and 1e3 * other,
            ratio(other, own), error,
        )  # fmt: skip
    return True


def _seconds(bench: Bench, system: Any, what: str, times: int) -> float:
    with torch.set_grad_enabled(what == _BOTH):
        return bench.clock.median(lambda _: system.both() if what == _BOTH else system.forward(), times)


class Ours:
    """The engine's backend on these tensors."""

    def __init__(self, bench: Bench, rows: Rows, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
        """q and grad [Hq, T, D], k and v [Hkv, prefix + T, D]"""
        self._spans = bench.backend.span_rows(rows.prefix, rows.lengths, q.dtype, q.device)
        self._score = Score(q.shape[2] ** -0.5)
        self._keys, self._grad = (k, v), grad
        self._own = [t.contiguous().requires_grad_() for t in (q.clone(), k[:, rows.prefix :], v[:, rows.prefix :])]
        self._before = [t[:, : rows.prefix].contiguous().requires_grad_() for t in (k, v)] if rows.prefix else []

    def forward(self) -> Tensor:
        """[Hq, T, D]"""
        return self._spans.forward(self._own[0].detach(), *self._keys, self._score, None)[0]

    def both(self) -> Sequence[Tensor]:
        """Forward, and the gradients of q, k and v of the rows, and of k and v of the prefix."""
        before = (self._before[0], self._before[1]) if self._before else None
        q, k, v = self._own
        out = self._spans.differentiable(q, k, v, before, self._score, None, None)
        return torch.autograd.grad(out, [*self._own, *self._before], self._grad)

    def results(self) -> list[Tensor]:
        """out, dq, dk, dv, each [heads, rows, D]"""
        dq, dk, dv, *before = self.both()
        dk, dv = (torch.cat([b, d], 1) for b, d in zip(before, (dk, dv), strict=True)) if before else (dk, dv)
        return [self.forward(), dq, dk, dv]


def _tensors(bench: Bench, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator(bench.device).manual_seed(0)
    count, shape = sum(rows.lengths), bench.geometry

    def made(heads: int, length: int) -> Tensor:
        return torch.randn(heads, length, shape.head_dim, generator=generator, device=bench.device).to(bench.dtype)

    keys = rows.prefix + count
    return made(shape.heads, count), made(shape.kv_heads, keys), made(shape.kv_heads, keys), made(shape.heads, count)


def _torchs(inputs: tuple[Tensor, Tensor, Tensor, Tensor], rows: Rows, table: Table) -> OneCall | OneByOne | None:
    """The first of torch's ways that runs here, which a note names; None: none does."""
    lengths = [(length, length + (0 if number else rows.prefix)) for number, length in enumerate(rows.lengths)]
    problem = ""
    for way in (OneCall, OneByOne):
        try:
            found = way(*inputs, lengths)
            found.both()
        except Exception as error:  # noqa: BLE001 - a peer that does not run here is named, and the table goes on
            problem = " ".join(str(error).split())[:200]
            continue
        table.notes.append(f"{rows.name}: torch ran {way.name}.")
        return found
    table.notes.append(f"{rows.name}: torch's own could not be measured: {problem}")
    return None


def _differences(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[str]:
    """Relative to torch's norms: of the output, and the worst of the gradients."""
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, theirs, strict=True)]
    return [f"{error:.1e}" for error in (errors[0], max(errors[1:]))]


def _decode(bench: Bench, sequences: int, context: int, times: int) -> float:
    """Seconds of one new row for each of so many sequences, whose blocks lie in the cache as they come."""
    shape, device = bench.geometry, bench.device
    blocks = -(-context // _BLOCK)
    order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0)).tolist()
    segments = [Segment(n, 1, context, order[n * blocks : (n + 1) * blocks]) for n in range(sequences)]
    rows = bench.backend.paged_rows(segments, _BLOCK, bench.dtype, device)
    cache = (len(order) * _BLOCK, shape.kv_heads, shape.head_dim)
    keys, values = (torch.randn(cache, device=device).to(bench.dtype) for _ in range(2))
    q = torch.randn(sequences, shape.heads, shape.head_dim, device=device).to(bench.dtype)
    score = Score(shape.head_dim**-0.5)
    return bench.clock.median(lambda _: rows.attend(q, keys, values, score, None), times)
