"""Decode: milliseconds a step by batch, over the floor of the bytes it must read, beside transformers' batching.

The floor of a step is (bytes of all products' weights + bytes of the keys and values at hand) ÷ the copy rate measured
in the same run. A step's time runs from mark to mark over whole engine iterations: planning, forward, sampling and
handing the tokens out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import ratio, say
from peers.continuous_batching import BATCH_TOKENS, ContinuousBatching

from coserve.scheduler.config import SchedulerConfig
from coserve.server.wire.messages import AdapterRef
from gpu_tables.bench import Bench
from gpu_tables.breakdown import breakdown, in_words
from gpu_tables.geometry import random_model
from gpu_tables.stand import Stand
from gpu_tables.table import OUT_OF_MEMORY, Table


@dataclass(frozen=True, slots=True)
class Size:
    batches: tuple[int, ...]
    taken_apart: tuple[int, ...]  # batches whose steps are also shown kernel by kernel
    context: int
    steps: int
    warm: int
    kv_memory: int
    rounds: int


FULL = Size((1, 8, 32, 64, 128), (1, 64), 1024, 48, 8, 32 << 30, 2)
TOY = Size((1, 3), (3,), 64, 6, 2, 16 << 20, 1)
_PROFILED = 8  # steps
CALM_ITL_MS = 60_000.0  # no promise cuts the prompts into small chunks here


@dataclass(frozen=True, slots=True)
class Steps:
    """Measured decode steps of one batch."""

    seconds: float  # median
    context: float  # tokens a sequence, on average over sequences and steps
    parts: dict[str, Any] | None = None  # see `breakdown`


def decode_steps(
    stand: Stand, bench: Bench, batch: int, context: int, size: Size, adapters: Sequence[AdapterRef | None] = ()
) -> Steps:
    """Decode steps of `batch` requests with about `context` tokens each; no two share a prefix."""
    # The first of them decode while the last ones' prompts still run: shorter prompts, so that the mean comes out.
    ahead = batch * context // SchedulerConfig().max_chunk
    length = max(context - ahead // 2 - size.warm - size.steps // 2, context // 2)
    requests = stand.generate(stand.prompts(batch, length), 2 * ahead + size.warm + size.steps + 64, adapters)
    stand.until(lambda: all(stand.tokens[request] for request in requests))
    for _ in range(size.warm):
        stand.step()
    stand.file()
    before = sum(stand.tokens[request] for request in requests)
    marks = [bench.clock.mark()]
    for _ in range(size.steps):
        stand.step()
        marks.append(bench.clock.mark())
    seconds = statistics.median(bench.clock.seconds(marks))
    stand.file()
    after = sum(stand.tokens[request] for request in requests)
    if abs(after - before - batch * size.steps) > batch:
        raise RuntimeError(f"{size.steps} iterations gave {after - before} tokens to {batch} requests")
    parts = breakdown(bench.device, stand.step, _PROFILED) if batch in size.taken_apart else None
    stand.abort(requests)
    return Steps(seconds, length + (before + after) / 2 / batch, parts)


def floor_seconds(bench: Bench, batch: int, context: float) -> float:
    geometry = bench.geometry
    return (geometry.weight_bytes(bench.dtype) + batch * context * geometry.kv_bytes(bench.dtype)) / bench.copy_rate


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    table = bench.table(
        "decode", f"Decode steps at about {size.context} tokens of context",
        ["batch", "context", "step ms", "floor ms", "÷ floor", "transformers ms", "its ÷ floor",
         "transformers ÷ coserve"],
    )  # fmt: skip
    table.figure("copy_bytes_per_second", bench.copy_rate)
    ours: dict[int, Steps] = {}  # without those batches for which memory ran out
    bench.attempt(table, "coserve", lambda: _ours(bench, size, table, ours))
    bench.memory.release()
    say("transformers' continuous batching")
    theirs: dict[int, float | None] = {}
    peer = None
    try:
        peer = ContinuousBatching(
            random_model(bench.geometry, bench.dtype, bench.device), max(size.batches), 2 * size.context
        )
        table.notes.append(f"transformers ran with the attention `{peer.attention}`.")
    except Exception as error:  # noqa: BLE001 - a peer that does not run here is named, and the table goes on
        table.notes.append(f"transformers' continuous batching could not be measured: {error}")
    for batch in size.batches:
        theirs[batch] = _peer_seconds(peer, bench, batch, size, table.notes)
        own = ours.get(batch)
        context, seconds = (own.context, own.seconds) if own else (size.context, None)
        floor = floor_seconds(bench, batch, context)
        table.figures.setdefault("floor_seconds", {})[str(batch)] = floor
        table.figures.setdefault("transformers_seconds", {})[str(batch)] = theirs[batch]
        other = theirs[batch]
        table.row(
            batch, round(context), 1e3 * seconds if seconds else OUT_OF_MEMORY, 1e3 * floor, ratio(seconds, floor),
            other and 1e3 * other, ratio(other, floor), ratio(other, seconds),
        )  # fmt: skip
    if peer is not None:
        peer.close()
    for batch in size.batches:
        floor = table.figures["floor_seconds"][str(batch)]
        seconds, ran_out = (ours[batch].seconds, False) if batch in ours else (None, True)
        if batch <= 64:
            table.aim(f"step ÷ floor, batch {batch}", ratio(seconds, floor), 1.35, ran_out=ran_out)
        over = ratio(theirs[batch], seconds)
        table.aim(f"transformers ÷ coserve, batch {batch}", over, 2, at_least=True, ran_out=ran_out)
    table.finish()


def _ours(bench: Bench, size: Size, table: Table, found: dict[int, Steps]) -> None:
    """coserve's steps by batch into `found`."""
    with bench.stand(
        kv_memory=size.kv_memory, adapter_memory=64 << 20, max_model_len=4 * size.context, slo_itl_ms=CALM_ITL_MS,
        max_running=max(size.batches),
    ) as stand:  # fmt: skip
        for batch in size.batches:
            measure = partial(decode_steps, stand, bench, batch, size.context, size)
            steps = bench.attempt(table, f"coserve, batch {batch}", measure, stand)
            if steps is None:
                continue
            found[batch] = steps
            say(f"batch {batch}: {1e3 * steps.seconds:.2f} ms")
            if steps.parts is not None:
                table.figures.setdefault("parts", {})[str(batch)] = steps.parts
                table.notes.append(in_words(f"A step at batch {batch}", steps.parts, steps.seconds))
            table.figure("coserve_seconds", {str(b): s.seconds for b, s in found.items()})


def _peer_seconds(
    peer: ContinuousBatching | None, bench: Bench, batch: int, size: Size, notes: list[str]
) -> float | None:
    """Median of the rounds; None, and a note, where the peer does not do it."""
    if peer is None:
        return None
    found = []
    ahead = batch * size.context // BATCH_TOKENS
    length = size.context - ahead // 2 - size.steps // 2
    try:
        for number in range(size.rounds):
            generator = torch.Generator().manual_seed(1000 * batch + number)
            prompts = torch.randint(3, bench.geometry.vocabulary, (batch, length), generator=generator).tolist()
            found.append(peer.step_seconds(prompts, 2 * ahead + size.warm + size.steps, size.steps))
    except Exception as error:  # noqa: BLE001 - the peer's failure is a gap in the table
        notes.append(f"transformers' continuous batching, batch {batch}: {error}")
    return statistics.median(found) if found else None
