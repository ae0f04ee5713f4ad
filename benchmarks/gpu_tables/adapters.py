"""Adapters: what LoRA costs a decode step and a prompt, by the number of adapters in a batch, their spread and ranks.

Row "off" is an engine with nothing in its adapter memory, measured first and last: what lies between its two rows is
noise. All others have adapters resident; "on, unused" serves the base model to every request. Every version has pages
of its own, whatever file it came from. The floor of a row counts the bytes of the adapters that its batch names: with
many different ones they are a good part of the weights, and no kernel reads them for nothing. Rows "batch N" are
smaller batches, each in both families of LoRA launches, whichever of them the engine would choose.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness import ratio, say

from coserve.kernels.lora import Family, FamilyLimits
from coserve.server.wire.messages import AdapterRef
from gpu_tables.bench import Bench
from gpu_tables.decode import CALM_ITL_MS, decode_steps, floor_seconds
from gpu_tables.decode import Size as Steps
from gpu_tables.orders import write_adapter
from gpu_tables.stand import Stand
from gpu_tables.table import Table

MIXED = (32, 8, 16, 64)  # the first one, which a batch of one adapter uses, is next to their mean


@dataclass(frozen=True, slots=True)
class Size:
    batch: int
    counts: tuple[int, ...]  # of adapters in a batch
    steps: Steps
    prompts: int  # of a round of prefill
    prompt: int
    rounds: int
    kv_memory: int
    adapter_memory: int
    small_batches: tuple[int, ...]  # in both families


FULL = Size(128, (1, 8, 32, 128), Steps((), (), 256, 32, 6, 0, 1), 8, 512, 5, 16 << 30, 32 << 30, (8, 32, 64))
TOY = Size(4, (1, 4), Steps((), (), 16, 4, 1, 0, 1), 2, 16, 2, 16 << 20, 32 << 20, (2,))


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    adapters: int
    spread: str  # how the batch's requests choose among them
    ranks: tuple[int, ...]


def rows(counts: Sequence[int]) -> list[Row]:
    found = [Row("on, unused", 0, "base", (16,))]
    for ranks, name in (((16,), "rank 16"), (MIXED, "ranks mixed")):
        found.append(Row(f"1, {name}", 1, "identical", ranks))
        for count in counts:
            if count > 1:
                found += [Row(f"{count}, {name}", count, spread, ranks) for spread in ("zipf 1.5", "distinct")]
    return found


class Versions:
    """Adapter versions by number: as many as are asked for, from one file a rank."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._paths = {rank: write_adapter(stand.data_dir, f"rank-{rank}", stand.model, rank) for rank in MIXED}

    def bring(self, count: int) -> None:
        """That many of rank 16 into the pool, used once."""
        refs = [self._version(number, (16,)) for number in range(count)]
        prompts = [[5, 6, 7, 8]] * count
        requests = self._stand.generate(prompts, 1, refs)
        self._stand.until(lambda: all(self._stand.tokens[request] for request in requests))

    def choose(self, row: Row, batch: int) -> list[AdapterRef | None]:
        """One a request of the batch; the same for the same row."""
        if not row.adapters:
            return [None] * batch
        rng = random.Random(row.adapters)
        if row.spread == "zipf 1.5":
            numbers = range(row.adapters)
            chosen = rng.choices(numbers, [(n + 1) ** -1.5 for n in numbers], k=batch)
        else:
            chosen = [i % row.adapters for i in range(batch)]
        return [self._version(number, row.ranks) for number in sorted(chosen)]

    def _version(self, number: int, ranks: tuple[int, ...]) -> AdapterRef:
        rank = ranks[number % len(ranks)]
        return AdapterRef(f"{rank:032x}{number:032x}", self._paths[rank])


def _rank_of(digest: str) -> int:
    return int(digest[:32], 16)


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    table = bench.table(
        "adapters", f"Adapters: decode steps of {size.batch} requests at about {size.steps.context} tokens of context",
        ["adapters", "requests choose", "in the batch", "step ms", "÷ off", "÷ 1 adapter", "floor ms", "÷ floor",
         "MiB reserved", "prefill ms", "prefill ÷ off"],
    )  # fmt: skip
    first = _off(bench, size, table, "0, off", None)
    left = rows(size.counts)
    steps: dict[Row, float] = {}
    bench.attempt(table, "with adapters", partial(_resident, bench, size, table, first, left, steps))
    for row in left:  # the engine itself did not start, or did not go on
        _lack(table, row, most=max(size.counts))
    last = _off(bench, size, table, "0, off again", first)
    unused = next((seconds for row, seconds in steps.items() if not row.adapters), None)
    off = (first.step + last.step) / 2 if first and last else None
    table.aim("LoRA on but unused ÷ off, the mean of its two rows", ratio(unused, off), 1.01,
              ran_out=unused is None or off is None)  # fmt: skip
    table.finish()


def _resident(
    bench: Bench, size: Size, table: Table, off: Found | None, left: list[Row], steps: dict[Row, float]
) -> None:
    """The rows of an engine that has adapters: each leaves `left`, and puts its seconds a step into `steps`."""
    with bench.stand(adapter_memory=size.adapter_memory, **_options(bench, size)) as stand:
        versions = Versions(stand)
        versions.bring(max(size.counts))
        while left:
            row = left[0]
            measure = partial(_measure, stand, bench, size, versions.choose(row, size.batch))
            found = bench.attempt(table, f"{row.name}, {row.spread}", measure, stand)
            left.pop(0)
            if found is None:
                _lack(table, row, most=max(size.counts))
                continue
            steps[row] = found.step
            one = next((s for r, s in steps.items() if r.spread == "identical" and r.ranks == row.ranks), None)
            over_one = ratio(found.step, one) if row.adapters > 1 else None
            _show(table, row.name, row.spread, found, off, over_one)
            _aims(table, row, found, off, over_one, most=max(size.counts))
        _both_families(stand, bench, size, table, versions)


def _lack(table: Table, row: Row, most: int) -> None:
    table.lack(row.name, row.spread)
    _aims(table, row, None, None, None, most)


@dataclass(frozen=True, slots=True)
class Found:
    """Of one row: seconds, bytes."""

    adapters: int  # different ones in the batch
    step: float
    floor: float
    reserved: float
    prefill: float


def _options(bench: Bench, size: Size) -> dict[str, Any]:
    return {
        "kv_memory": size.kv_memory, "max_model_len": 512 if bench.smoke else 4096, "slo_itl_ms": CALM_ITL_MS,
        "max_running": max(size.batch, size.prompts),
    }  # fmt: skip


def _both_families(stand: Stand, bench: Bench, size: Size, table: Table, versions: Versions) -> None:
    """Small batches with one adapter, with one for four requests, and with one for each; rank 16."""
    base = bench.model.base
    chooses = base.backend
    if chooses.families is None:
        table.notes.append("Plain torch has one family of LoRA launches: there is nothing to compare.")
        return
    from coserve.server.engine.triton_backend import TritonBackend  # here: it imports Triton

    for batch in size.small_batches:
        for adapters in sorted({1, max(1, batch // 4), batch}):
            chosen = versions.choose(Row("", adapters, "evenly", (16,)), batch)
            all_rows = FamilyLimits(rows=batch, rows_float32=batch, rows_an_adapter=batch)
            for family, limits in ((Family.GROUPED, None), (Family.PER_ROW, all_rows)):
                base.backend = TritonBackend(limits)
                name = f"batch {batch}, {family.value}"
                found = bench.attempt(
                    table, name, partial(_measure, stand, bench, replace(size, batch=batch), chosen), stand
                )
                if found is None:
                    table.lack(name, "evenly")
                else:
                    _show(table, name, "evenly", found, None, None)
    base.backend = chooses


def _off(bench: Bench, size: Size, table: Table, name: str, first: Found | None) -> Found | None:
    """A row without adapters, from an engine that has no memory for any."""

    def measure() -> Found:
        with bench.stand(adapter_memory=0, **_options(bench, size)) as stand:
            return _measure(stand, bench, size, ())

    found = bench.attempt(table, name, measure)
    if found is None:
        table.lack(name, "base")
    else:
        _show(table, name, "base", found, first or found, None)
    return found


def _measure(stand: Stand, bench: Bench, size: Size, chosen: Sequence[AdapterRef | None]) -> Found:
    steps = decode_steps(stand, bench, size.batch, size.steps.context, size.steps, chosen)
    reserved = _bytes_reserved(stand)
    prefill = _prefill(stand, bench, size, chosen[:: max(1, size.batch // size.prompts)][: size.prompts])
    distinct = {ref.digest for ref in chosen if ref is not None}
    elements = sum(bench.geometry.lora_parameters(_rank_of(digest)) for digest in distinct)
    floor = floor_seconds(bench, size.batch, steps.context) + elements * bench.dtype.itemsize / bench.copy_rate
    return Found(len(distinct), steps.seconds, floor, reserved, prefill)


def _show(table: Table, name: str, spread: str, found: Found, off: Found | None, over_one: float | None) -> None:
    say(f"{name}, {spread}: {1e3 * found.step:.2f} ms")
    table.row(
        name, spread, found.adapters, 1e3 * found.step, off and found.step / off.step, over_one, 1e3 * found.floor,
        found.step / found.floor, found.reserved / 2**20, 1e3 * found.prefill, off and found.prefill / off.prefill,
    )  # fmt: skip


def _aims(
    table: Table, row: Row, found: Found | None, off: Found | None, over_one: float | None, most: int
) -> None:  # fmt: skip
    """Of a row, None: for which memory ran out."""
    label, ran_out = f"{row.name}, {row.spread}", found is None
    step, prefill = (found.step / off.step, found.prefill / off.prefill) if found and off else (None, None)
    if row.adapters == 1:
        table.aim(f"{label} ÷ off", step, 1.10, ran_out=ran_out)
    elif row.adapters == most:
        table.aim(f"{label} ÷ 1 adapter", over_one, 1.05, ran_out=ran_out)
    if row.adapters in (1, most):
        table.aim(f"prefill, {label} ÷ off", prefill, 1.15, ran_out=ran_out)


def _prefill(stand: Stand, bench: Bench, size: Size, adapters: Sequence[AdapterRef | None]) -> float:
    """Median seconds of a round of prompts, from the first iteration to the last first token."""
    seconds = []
    for number in range(size.rounds + 1):
        prompts = stand.prompts(size.prompts, size.prompt)
        marks = [bench.clock.mark()]
        requests = stand.generate(prompts, 1, adapters)
        stand.until(lambda requests=requests: all(stand.tokens[request] for request in requests))
        marks.append(bench.clock.mark())
        if number:  # the first round warms up, and brings adapters that are not resident
            seconds += bench.clock.seconds(marks)
    return statistics.median(seconds)


def _bytes_reserved(stand: Stand) -> float:
    """Of the adapter memory, as the engine tells it."""
    stand.gauges = {}
    stand.until(lambda: "coserve_adapter_pool_bytes_used" in stand.gauges)
    return stand.gauges["coserve_adapter_pool_bytes_used"]
