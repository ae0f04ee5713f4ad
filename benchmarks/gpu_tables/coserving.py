"""Co-serving: random arrivals beside a finetuning job, under coserve's scheduler and under rules that take turns.

q is the rate of requests, its largest value that inference alone serves with 99% inside both promises is found first.
Each rule then serves shares of it, on one engine, with one job that is never stopped. Retention is training tokens
a second of completed steps over those of the job with the engine to itself; the gain is retention + q ÷ that largest q,
which taking turns cannot bring above 1. A request is inside when its first token and its time per output token are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import ratio, say

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.simulation.policies import policies
from gpu_tables.bench import Bench
from gpu_tables.orders import write_job
from gpu_tables.stand import Stand, failure
from gpu_tables.table import Table

LOAD = Path(__file__).resolve().parent / "load.py"
OURS, ALONE = "coserve", "inference only"
RIVALS = ("SLO-limited temporal sharing", "temporal sharing, 64", "temporal sharing, 128", "temporal sharing, 512")
ATTAINMENT = 0.99
RANK = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Seconds, tokens, bytes, requests a second."""

    shares: tuple[float, ...]  # of the largest rate that inference alone sustains
    rivals: tuple[str, ...]
    warm: float
    seconds: float
    probe_seconds: float
    first_rate: float
    most_rate: float
    bisections: int
    prompt: int
    new_tokens: int
    length: int  # of a training sequence; two make a step
    itl: float
    ttft: float
    kv_memory: int
    adapter_memory: int


FULL = Size((0.25, 0.5, 0.75, 0.9), RIVALS, 1.5, 8.0, 6.0, 4.0, 256.0, 3, 512, 64, 2048, 0.05, 1.0, 32 << 30, 1 << 30)
TOY = Size((0.5,), (RIVALS[0], RIVALS[1]), 0.2, 0.8, 0.4, 16.0, 16.0, 0, 16, 8, 32, 0.05, 1.0, 16 << 20, 4 << 20)


class Switch:
    """Every rule in one place: the engine asks whichever is `current`. All learn from the start's calibration, and all
    plan after the iteration before: rivals have no drafts."""

    def __init__(self, config: SchedulerConfig) -> None:
        makers = policies(config)
        self._rules = {name: makers[name]() for name in (OURS, ALONE, *RIVALS)}
        self.current: str | None = None
        # One tenant sends everything here, so whose books of it the engine reads does not matter.
        ours = self._rules[OURS]
        self.share, self.queue, self.account, self.forecast = ours.share, ours.queue, ours.account, ours.forecast
        self.errors, self.sweep_waits, self.shortened = ours.errors, ours.sweep_waits, ours.shortened

    def plan(self, state: Any) -> Any:
        return self._rules[self.current or OURS].plan(state)

    def observe(self, *observed: Any) -> None:
        for name, rule in self._rules.items():
            if self.current in (None, name):
                rule.observe(*observed)


class Course:
    """The engine with its job, on which every rule has its turns. What runs out of memory there raises MemoryError,
    and a job that did is followed by another one."""

    def __init__(self, stand: Stand, switch: Switch, bench: Bench, size: Size) -> None:
        self._stand, self._switch, self._bench, self._size = stand, switch, bench, size
        self._turns = self._jobs = 0
        self._start_job()

    @property
    def _job(self) -> str:
        return f"beside-{self._jobs}"

    def _start_job(self) -> None:
        stand, size = self._stand, self._size
        self._jobs += 1
        rows = torch.randint(3, self._bench.geometry.vocabulary, (64, size.length)).numpy()
        write_job(stand.data_dir, self._job, stand.model.digest, rows, rank=RANK, batch=2)
        self._switch.current = OURS
        stand.start_job(self._job)
        stand.until(lambda: stand.steps[self._job] >= 2)

    def end(self) -> None:
        self._stand.connect()
        if not self._stand.events(self._job, "failed"):
            self._stand.cancel_job(self._job)

    def training_alone(self) -> float:
        """Tokens a second of the job with the engine to itself."""
        self._switch.current = OURS
        began = time.time()
        self._run(lambda: time.time() >= began + self._size.warm + self._size.seconds)
        return self._trained(began + self._size.warm, began + self._size.warm + self._size.seconds)

    def serve(self, rule: str, rate: float, seconds: float) -> dict[str, Any]:
        """What the load process says, and `training`: tokens a second in its window."""
        if self._stand.events(self._job, "failed"):
            self._stand.connect()
            self._start_job()
        self._switch.current = rule
        self._turns += 1
        size = self._size
        order = {
            "socket": self._stand.socket_path, "rate": rate, "warm": size.warm, "seconds": seconds,
            "prompt": size.prompt, "new_tokens": size.new_tokens, "spread": 0.5, "itl": size.itl, "ttft": size.ttft,
            "vocabulary": self._bench.geometry.vocabulary, "seed": self._turns,
        }  # fmt: skip
        with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as said:
            told.write(json.dumps(order))
            told.seek(0)
            process = subprocess.Popen([sys.executable, str(LOAD)], stdin=told, stdout=said, text=True)
            try:
                looked = time.monotonic()

                def ended() -> bool:
                    nonlocal looked
                    if time.monotonic() < looked + 0.02:  # a look is a system call
                        return False
                    looked = time.monotonic()
                    return process.poll() is not None

                self._run(ended)
            finally:
                process.kill()
                process.wait()
            said.seek(0)
            answer = said.read()
        if not answer:
            raise RuntimeError("the load process gave no answer; its last words stand above")
        found = json.loads(answer)
        return {**found, "rate": rate, "training": self._trained(found["opened"], found["closed"])}

    def _run(self, ended: Any) -> None:
        """The engine's own loop, until then."""
        engine = self._stand.engine
        while not ended():
            if not engine.step():
                time.sleep(0.0002)

    def _trained(self, opened: float, closed: float) -> float:
        """Tokens a second of the steps that were completed in between."""
        for failed in self._stand.events(self._job, "failed"):
            raise failure(f"job {self._job}", failed["data"]["code"], failed["message"])
        steps = [e for e in self._stand.events(self._job, "step") if opened <= e["created_at"] < closed]
        return sum(e["data"]["tokens"] for e in steps) / (closed - opened)


def run(bench: Bench) -> None:
    size = TOY if bench.smoke else FULL
    table = bench.table(
        "co-serving",
        f"Co-serving: Poisson arrivals of about {size.prompt} + {size.new_tokens} tokens, promises "
        f"{1e3 * size.itl:.0f} ms between tokens and {size.ttft:g} s to the first, a job of rank {RANK} on rows of "
        f"{size.length} tokens",
        ["share of q", "requests/s", "rule", "requests inside", "ITL P50 ms", "P99 ms", "TTFT P50 ms", "P99 ms ",
         "training tokens/s", "retention", "gain"],
    )  # fmt: skip
    left = list(size.shares)
    bench.attempt(table, "co-serving", partial(_shares, bench, size, table, left))
    for share in left:  # the engine itself did not start, or did not go on
        table.lack(share, None, OURS)
        _aims(size, table, share, {})
    table.finish()


def _shares(bench: Bench, size: Size, table: Table, left: list[float]) -> None:
    """Every share in turn; it leaves `left` when its rows are there."""
    switches: list[Switch] = []

    def policy(config: SchedulerConfig) -> Switch:
        switches.append(Switch(config))
        return switches[-1]

    with bench.stand(
        policy=policy, slo_itl_ms=1e3 * size.itl, slo_ttft_ms=1e3 * size.ttft, kv_memory=size.kv_memory,
        adapter_memory=size.adapter_memory, max_model_len=4 * (size.prompt + size.new_tokens), plan_ahead=False,
    ) as stand:  # fmt: skip
        course = Course(stand, switches[-1], bench, size)
        alone = course.training_alone()
        say(f"the job alone: {alone:.0f} tokens/s")
        table.figure("training_alone_tokens_per_second", alone)
        best = _best_rate(course, size, table)
        table.figure("best_rate_alone", best)
        table.row(0.0, 0.0, OURS, None, None, None, None, None, alone, 1.0, 1.0)
        while left:
            _at_share(bench, course, size, table, left[0], best, alone)
            left.pop(0)
        course.end()


def _best_rate(course: Course, size: Size, table: Table) -> float:
    """The largest rate found at which inference alone keeps its promises: doubling, then halving the distance."""
    probes: dict[float, float] = {}

    def kept(rate: float) -> bool:
        found = course.serve(ALONE, rate, size.probe_seconds)
        probes[rate] = found["attainment"] or 0.0
        say(f"inference alone, {rate:g} requests/s: {100 * probes[rate]:.1f}% inside")
        table.figure("probes_alone", {f"{r:g}": attainment for r, attainment in probes.items()})
        return probes[rate] >= ATTAINMENT

    low, rate = 0.0, size.first_rate
    while rate <= size.most_rate and kept(rate):
        low, rate = rate, 2 * rate
    high = rate
    for _ in range(size.bisections):
        middle = (low + high) / 2
        if kept(middle):
            low = middle
        else:
            high = middle
    if not low:
        table.notes.append(f"Inference alone kept its promises at no rate tried; shares are of {size.first_rate:g}/s.")
    return low or size.first_rate


def _at_share(
    bench: Bench, course: Course, size: Size, table: Table, share: float, best: float, alone: float
) -> None:  # fmt: skip
    """All rules at one rate; a row each, and the aims of this rate."""
    found: dict[str, dict[str, Any]] = {}  # without those that ran out of memory
    for rule in (ALONE, OURS, *size.rivals):
        figures = bench.attempt(table, f"{share:.0%}, {rule}", partial(course.serve, rule, share * best, size.seconds))
        if figures is None:
            table.lack(share, share * best, rule)
            continue
        figures["retention"] = ratio(figures["training"], alone) or 0.0
        figures["gain"] = gain = figures["retention"] + share
        found[rule], attainment = figures, figures["attainment"]
        milliseconds = [t and 1e3 * t for t in (*figures["itl"], *figures["ttft"])]
        inside = None if attainment is None else f"{100 * attainment:.1f}%"
        table.row(
            share, figures["rate"], rule, inside, *milliseconds, figures["training"], figures["retention"], gain
        )  # fmt: skip
        say(f"{share:.0%}, {rule}: {inside} inside, gain {gain:.2f}")
    table.figures.setdefault("shares", {})[f"{share:g}"] = found
    _aims(size, table, share, found)


def _aims(size: Size, table: Table, share: float, found: dict[str, dict[str, Any]]) -> None:
    def kept(rule: str) -> bool:
        return rule in found and (found[rule]["attainment"] or 0.0) >= ATTAINMENT

    ours = found.get(OURS)
    if kept(ALONE):
        attainment = ours and ours["attainment"]
        table.aim(f"attainment at {share:.0%}", attainment, ATTAINMENT, at_least=True, ran_out=ours is None)
    table.aim(f"gain at {share:.0%}", ours and ours["gain"], 1.2, at_least=True, ran_out=ours is None)
    # A rule that breaks the promises has not served that rate.
    best = max((found[rule]["gain"] for rule in size.rivals if kept(rule)), default=0.0)
    table.aim(
        f"gain above the best rule that takes turns and keeps its promises, at {share:.0%}",
        ours and ours["gain"] - best, 0.0, at_least=True, ran_out=ours is None,
    )  # fmt: skip
