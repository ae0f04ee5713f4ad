"""Adapters: what LoRA costs a decode step and a prompt, by the number of adapters in a batch, their spread and ranks.

Row "off" is an engine with nothing in its adapter memory. All others have adapters resident; "on, unused" serves the
base model to every request. An adapter is in the pool once for each version, so every version of a row has pages of its
own, whatever file it came from. The floor of a row counts the bytes of the adapters that its batch names: with many
different ones they are a good part of the weights, and no kernel reads them for nothing.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness import ratio, say

from coserve.server.wire.messages import AdapterRef
from gpu_tables.bench import Bench
from gpu_tables.decode import Size as Steps
from gpu_tables.decode import decode_steps, floor_seconds
from gpu_tables.orders import write_adapter
from gpu_tables.stand import Stand, random_prompts

MIXED = (8, 16, 32, 64)


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


FULL = Size(128, (1, 8, 32, 128), Steps((), 256, 32, 6, 0, 1), 8, 512, 5, 16 << 30, 32 << 30)
TOY = Size(4, (1, 2, 4), Steps((), 16, 4, 1, 0, 1), 2, 16, 2, 16 << 20, 32 << 20)


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
        """That many of the first rank into the pool, used once."""
        refs = [self._version(number, MIXED[1:2]) for number in range(count)]
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


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    context = size.steps.context
    table = bench.table(
        "adapters", f"Adapters: decode steps of {size.batch} requests at about {context} tokens of context",
        ["adapters", "requests choose", "in the batch", "step ms", "÷ off", "÷ 1 adapter", "floor ms", "÷ floor",
         "MiB reserved", "prefill ms", "prefill ÷ off"],
    )  # fmt: skip
    options = {"kv_memory": size.kv_memory, "max_model_len": 4096 if not bench.smoke else 512, "slo_itl_ms": 60_000.0,
               "max_running": max(size.batch, size.prompts)}  # fmt: skip
    page = bench.model.base.hidden_size * 8 * bench.dtype.itemsize
    with bench.stand(adapter_memory=page, **options) as stand:
        off = decode_steps(stand, bench, size.batch, context, size.steps)
        off_prefill = _prefill(stand, bench, size, ())
        say(f"off: {1e3 * off.seconds:.2f} ms")
    floor = floor_seconds(bench, size.batch, off.context)
    table.row("0, off", "base", 0, 1e3 * off.seconds, 1.0, None, 1e3 * floor, off.seconds / floor, page / 2**20,
              1e3 * off_prefill, 1.0)  # fmt: skip
    one: dict[tuple[int, ...], float] = {}
    with bench.stand(adapter_memory=size.adapter_memory, **options) as stand:
        versions = Versions(stand)
        versions.bring(max(size.counts))
        for row in rows(size.counts):
            chosen = versions.choose(row, size.batch)
            found = decode_steps(stand, bench, size.batch, context, size.steps, chosen)
            held = _bytes_reserved(stand)
            prefill = _prefill(stand, bench, size, chosen[:: max(1, size.batch // size.prompts)][: size.prompts])
            if row.spread == "identical":
                one[row.ranks] = found.seconds
            distinct = {ref.digest: ref for ref in chosen if ref is not None}
            bytes_read = sum(
                bench.geometry.lora_parameters(int(digest[:32], 16)) * bench.dtype.itemsize for digest in distinct
            )
            floor = floor_seconds(bench, size.batch, found.context) + bytes_read / bench.copy_rate
            over_off = found.seconds / off.seconds
            over_one = ratio(found.seconds, one.get(row.ranks)) if row.adapters > 1 else None
            say(f"{row.name}, {row.spread}: {1e3 * found.seconds:.2f} ms")
            table.row(
                row.name, row.spread, len(distinct), 1e3 * found.seconds, over_off, over_one, 1e3 * floor,
                found.seconds / floor, held / 2**20, 1e3 * prefill, prefill / off_prefill,
            )  # fmt: skip
            label = f"{row.name}, {row.spread}"
            if not row.adapters:
                table.aim("LoRA on but unused ÷ off", over_off, 1.01)
            elif row.adapters == 1:
                table.aim(f"{label} ÷ off", over_off, 1.10)
                table.aim(f"prefill, {label} ÷ off", prefill / off_prefill, 1.15)
            elif row.adapters == max(size.counts):
                table.aim(f"{label} ÷ 1 adapter", over_one, 1.05)
                table.aim(f"prefill, {label} ÷ off", prefill / off_prefill, 1.15)
    table.finish()


def _prefill(stand: Stand, bench: Bench, size: Size, adapters: Sequence[AdapterRef | None]) -> float:
    """Median seconds of a round of prompts, from the first iteration to the last first token."""
    seconds = []
    for number in range(size.rounds + 1):
        stand.prompts_made += 1
        prompts = random_prompts(size.prompts, size.prompt, bench.geometry.vocabulary, seed=stand.prompts_made)
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
