"""A burst comes and goes beside a job: who gives way, how soon, and who is back when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.simulation import Ledger, Noise, Setup, cards, simulate
from coserve.scheduler.simulation.streams import Stream
from coserve.scheduler.simulation.workloads import Lengths, Trace, TrainingJob

CARD = replace(cards()["cpu-270m"], noise=Noise(sigma=0.03))
PROMISE = 0.152  # four times the decode step of four streams
BURST = 10.0  # when seven streams join the one that runs all the time


def run(seed: int) -> Ledger:
    trace = Trace([], seed, Lengths(64, 64), ttft=20.0 * PROMISE)
    long = Stream("long", 0.0, 64, 4000, ttft=20.0 * PROMISE)
    trace._streams = [long, *(Stream(f"b{i}", BURST + 0.01 * i, 64, 48, ttft=20.0 * PROMISE) for i in range(7))]
    setup = Setup(CARD, itl=PROMISE, ttft=20.0 * PROMISE)
    make = lambda: Scheduler(SchedulerConfig(itl_seconds=PROMISE))  # noqa: E731
    return simulate(make, setup, trace, [TrainingJob("job")], seconds=30.0, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_promise_is_broken_for_two_iterations_at_most_and_training_is_back_within_a_second(seed: int) -> None:
    ledger = run(seed)
    ends = max(s.finished_at or 1e9 for s in ledger.streams if s.name != "long")
    during = [i for i in ledger.iterations if BURST <= i.began <= ends]
    assert BURST + 3.0 < ends < 25.0 and max(i.decodes for i in during) == 8
    assert sum(i.seconds > i.budget for i in during[:60]) <= 2
    prompts = [i for i in during if i.prefill > 32]
    assert prompts and sum(i.training for i in prompts) < 0.2 * sum(i.seconds for i in prompts), "prompts come first"

    def share(begin: float, end: float) -> float:
        """Of the time from `begin` to `end`, what went to training."""
        return sum(i.training for i in ledger.iterations if begin <= i.began < end) / (end - begin)

    assert share(ends, ends + 1.0) > 0.9 * share(4.0, BURST)
