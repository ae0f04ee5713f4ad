"""One tenant's training and another one's first tokens: what gives way, and what is left of an iteration."""

from __future__ import annotations

from dataclasses import replace

from scheduler_states import request, share_of, state, stream, sweep

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import RequestState, SweepJob


def test_training_gives_way_to_prompts_of_a_tenant_that_was_served_less() -> None:
    def trained(served: dict[str, float], *asking: RequestState, floor: float = 0.0) -> set[int]:
        scheduler = Scheduler(SchedulerConfig(itl_seconds=1e3, floor_share=floor))
        scheduler.share = share_of(served)
        sweeps = tuple(sweep(i, jobs=(SweepJob(f"j{i}", t, 1.0, "normal"),)) for i, t in enumerate("ab"))
        there = replace(state(*asking), sweeps=sweeps)
        scheduler._training.floor.settle(sweeps, 1e4, {})
        plan = scheduler.plan(there)
        assert plan.decodes or plan.prefills
        return {part.sweep_id for part in (*plan.rides, *plan.units)}

    mine, other = request("w1", tenant="b"), request("w2", tenant="a")
    assert trained({"a": 9.0, "b": 1.0}, mine) == {1}, "its own may go on"
    assert trained({"a": 9.0, "b": 1.0}, mine, other) == {1}, "of several prompts the least-served one counts"
    assert trained({"a": 1.0, "b": 9.0}, mine) == {0, 1} and trained({"a": 5.0, "b": 5.0}, mine) == {0, 1}
    assert trained({"a": 9.0, "b": 1.0}, stream("s1", tenant="b")) == {0, 1}, "streams have their promise"
    assert trained({"a": 9.0, "b": 8.0, "c": 1.0}, request("w1", tenant="c")) == set()
    assert trained({"a": 9.0, "b": 8.0, "c": 1.0}, request("w1", tenant="c"), floor=0.02) == {1}, "but for the floor"


def test_while_several_tenants_ask_training_leaves_part_of_the_promise() -> None:
    def longest(*streams: RequestState) -> float:
        scheduler = Scheduler(SchedulerConfig(itl_seconds=1.0, floor_share=0.0))
        plan = scheduler.plan(replace(state(*streams), sweeps=(sweep(stream_tokens=4000),)))
        assert plan.units or plan.rides
        return plan.upper_seconds

    assert longest(stream("s1"), stream("s2", tenant="other")) <= 0.8 < longest(stream("s1"), stream("s2")) <= 1.0
