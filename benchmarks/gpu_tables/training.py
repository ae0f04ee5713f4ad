"""Training alone: tokens a second and activation bytes of both policies, beside a PEFT loop with and without
checkpointing.

LoRA of rank 16 on all linear modules, AdamW, every token bears a loss. The share of the ceiling is (FLOP a token that
the method needs × tokens a second) ÷ the product rate measured in the same run; `recompute` and checkpointing need a
second forward, which is counted. Activation bytes are above what stands between two steps: weights, K/V cache,
adapter, its gradients and the optimizer's state are in none of them. coserve's "stored" is the most that is held
between two iterations of its loop, PEFT's what is held between forward and backward.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from harness import ratio, say
from peers.peft_loop import PeftLoop

from gpu_tables.bench import Bench
from gpu_tables.breakdown import breakdown, in_words
from gpu_tables.geometry import random_model
from gpu_tables.orders import write_job
from gpu_tables.stand import Stand
from gpu_tables.table import OUT_OF_MEMORY

RANK = 16
FORWARDS = {"coserve, save": 1, "coserve, recompute": 2, "PEFT": 1, "PEFT, checkpointing": 2}
_MOST_TURNS = 200  # of the engine, that are taken apart: more than any step needs


@dataclass(frozen=True, slots=True)
class Size:
    lengths: tuple[int, ...]
    step_tokens: int
    warm: int
    steps: int
    kv_memory: int
    adapter_memory: int
    activation_memory: int


FULL = Size((2048, 8192), 16384, 2, 5, 1 << 30, 1 << 30, 72 << 30)
TOY = Size((32, 64), 128, 1, 2, 4 << 20, 4 << 20, 64 << 20)


@dataclass(frozen=True, slots=True)
class Found:
    """Of one system at one length; bytes a token."""

    rate: float
    stored: float | None = None
    peak: float | None = None
    parts: dict[str, Any] | None = None  # of an optimizer step; see `breakdown`


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    table = bench.table(
        "training", f"Training alone: rank {RANK}, steps of {size.step_tokens} tokens",
        ["length", "system", "tokens/s", "÷ PEFT", "GFLOP a token", "share of the ceiling", "stored KiB a token",
         "peak KiB a token", "PEFT's stored ÷ its", "PEFT's peak ÷ its"],
    )  # fmt: skip
    table.figure("product_flop_per_second", bench.product_rate)
    found: dict[int, dict[str, Found | None]] = {length: {} for length in size.lengths}
    for policy in ("save", "recompute"):
        for length in size.lengths:
            name = f"coserve, {policy}"
            measure = partial(_coserve, bench, size, length, policy)
            found[length][name] = answer = bench.attempt(table, f"{name}, length {length}", measure)
            if answer is None:
                continue
            say(f"{name}, length {length}: {answer.rate:.0f} tokens/s")
            table.figure(f"{name}, {length}", asdict(answer))
            if answer.parts is not None:
                said = in_words(f"A step under {policy}, length {length}", answer.parts, size.step_tokens / answer.rate)
                table.notes.append(said)
    bench.memory.release()
    loop = bench.attempt(table, "PEFT", partial(_peft_loop, bench))
    for length in size.lengths:
        for name, checkpointing in (("PEFT", False), ("PEFT, checkpointing", True)):
            measure = partial(_peft, loop, bench, size, length, name, checkpointing, table.notes)
            found[length][name] = loop and bench.attempt(table, f"{name}, length {length}", measure)
        for name, forwards in FORWARDS.items():
            table.row(length, name, *_cells(bench, length, forwards, found[length][name], found[length]["PEFT"]))
    if loop is not None:
        table.notes.append(f"PEFT ran with torch's scaled dot product attention: {loop.attention}.")
    for length in size.lengths:
        save, least, plain = (found[length][n] for n in ("coserve, save", "coserve, recompute", "PEFT"))
        flop = bench.geometry.training_flop(length, RANK)
        table.aim(f"save, share of the ceiling, length {length}", save and save.rate * flop / bench.product_rate, 0.7,
                  at_least=True, ran_out=save is None)  # fmt: skip
        table.aim(f"save ÷ PEFT, length {length}", save and plain and save.rate / plain.rate, 1.3, at_least=True,
                  ran_out=save is None)  # fmt: skip
        for part in ("stored", "peak"):
            ours, theirs = (getattr(f, part) if f else None for f in (least, plain))
            table.aim(f"PEFT's {part} bytes ÷ recompute's, length {length}", ratio(theirs, ours), 8, at_least=True,
                      ran_out=least is None)  # fmt: skip
    table.finish()


def _cells(bench: Bench, length: int, forwards: int, found: Found | None, plain: Found | None) -> list[object]:
    flop = bench.geometry.training_flop(length, RANK, forwards=forwards)
    if found is None:
        return [OUT_OF_MEMORY, None, flop / 1e9, None, None, None, None, None]
    theirs = plain or Found(0.0)
    return [
        found.rate, ratio(found.rate, theirs.rate), flop / 1e9, found.rate * flop / bench.product_rate,
        found.stored and found.stored / 1024, found.peak and found.peak / 1024,
        ratio(theirs.stored, found.stored), ratio(theirs.peak, found.peak),
    ]  # fmt: skip


def _coserve(bench: Bench, size: Size, length: int, policy: str) -> Found:
    """A job on the product's engine, nothing else in it."""
    batch = max(1, size.step_tokens // length)
    rows = torch.randint(3, bench.geometry.vocabulary, (4 * batch, length)).numpy()
    with bench.stand(
        activations=policy, kv_memory=size.kv_memory, adapter_memory=size.adapter_memory,
        activation_memory=size.activation_memory, max_running=4, max_model_len=2 * max(size.lengths),
    ) as stand:  # fmt: skip
        write_job(stand.data_dir, "alone", stand.model.digest, rows, rank=RANK, batch=batch)
        stand.start_job("alone")
        stand.until(lambda: stand.steps["alone"] >= size.warm)
        held: list[int] = []  # after each iteration
        idle: list[int] = []  # between two steps, while the optimizer has the adapter
        bench.memory.reset()
        while stand.steps["alone"] < size.warm + size.steps:
            ran = stand.step()
            stand.file()
            now = bench.memory.held()
            if now is not None:
                (held if ran else idle).append(now)
        peak = bench.memory.peak()
        times = [record["created_at"] for record in stand.events("alone", "step")][size.warm - 1 :]
        parts = breakdown(bench.device, lambda: _one_step(stand), 1)
        stand.cancel_job("alone")
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    tokens = batch * length
    if peak is None or not held or not idle:
        return Found(tokens / seconds, parts=parts)
    base = min(idle)
    return Found(tokens / seconds, (max(held) - base) / tokens, (peak - base) / tokens, parts)


def _one_step(stand: Stand) -> None:
    """From the end of an optimizer step to the end of the next, or so many turns of the engine: the profiler keeps
    every event of them."""
    done, turns = stand.steps["alone"], itertools.count(1)
    stand.until(lambda: stand.steps["alone"] > done or next(turns) > _MOST_TURNS)


def _peft_loop(bench: Bench) -> PeftLoop:
    return PeftLoop(random_model(bench.geometry, bench.dtype, bench.device), RANK, bench.clock, bench.memory)


def _peft(
    loop: PeftLoop, bench: Bench, size: Size, length: int, name: str, checkpointing: bool, notes: list[str]
) -> Found:
    """Memory runs out where not even one row at a time fits."""
    batch = max(1, size.step_tokens // length)
    rows = torch.randint(3, bench.geometry.vocabulary, (batch, length), device=bench.device)
    measured = loop.measure(rows, size.steps, checkpointing=checkpointing)
    say(f"{name}, length {length}: {batch * length / measured.seconds:.0f} tokens/s")
    notes.append(f"{name}, length {length}: micro-batches of {measured.rows} rows.")
    tokens = measured.rows * length
    return Found(
        batch * length / measured.seconds,
        None if measured.stored is None else measured.stored / tokens,
        None if measured.peak is None else measured.peak / tokens,
    )
