"""Whose prompt is next: by counters, and among tenants that are level by who is due next."""

from __future__ import annotations

from scheduler_states import meet, request, state

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.fairness import FairShare
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.state import RequestState

LEVEL = 0.1
ROW = 0.0001  # a prompt of 20 tokens: 2 ms


def order(served: dict[str, float], *queue: RequestState, now: float = 100.0, level: float = LEVEL) -> list[str]:
    share = FairShare(1.0, 60.0, level)
    meet(share, state(*(request(f"w{i}", tenant=t) for i, t in enumerate(served))))
    share.charge(served)
    share.row_seconds = ROW
    return [r.request_id for r in Lineup(state(*queue, now=now), share)]


def due(name: str, tenant: str, at: float, **changes: object) -> RequestState:
    return request(name, tenant=tenant, ttft_deadline=at, **changes)


def test_level_tenants_take_turns_by_the_next_deadline() -> None:
    queue = [due("w1", "a", 109.0), due("w2", "a", 101.0), due("w3", "b", 103.0), due("w4", "c", 102.0),
             due("w5", "c", 110.0)]  # fmt: skip
    counters = {"a": 0.05, "b": 0.01, "c": 0.03}
    assert order(counters, *queue) == ["w2", "w4", "w3", "w1", "w5"]
    assert order(counters, *queue, level=0.0) == ["w3", "w4", "w5", "w2", "w1"], "where no difference is small"


def test_counters_that_are_apart_decide_whatever_is_due() -> None:
    queue = [due("w1", "a", 100.1), due("w2", "b", 150.0), due("w3", "b", 160.0)]
    assert order({"a": 0.25, "b": 0.05}, *queue) == ["w2", "w3", "w1"]


def test_turns_given_count_so_a_flood_of_near_deadlines_gets_no_more_than_the_others() -> None:
    """Prompts of 40 ms: three of them and a tenant is not level any more."""
    flood = [due(f"w{i}", "a", 101.0, total_tokens=400) for i in range(10, 20)]
    calm = [due(f"w{i}", "b", 109.0, total_tokens=400) for i in range(20, 30)]
    found = order({"a": 0.0, "b": 0.0}, *flood, *calm)
    assert found[:3] == ["w10", "w11", "w12"]
    for n in range(1, 20):
        assert abs(sum(name < "w20" for name in found[:n]) - sum(name >= "w20" for name in found[:n])) <= 3


def test_who_is_late_already_is_after_those_who_can_be_in_time() -> None:
    queue = [due("w1", "a", 99.0), due("w2", "a", 98.0), due("w3", "b", 104.0)]
    assert order({"a": 0.0, "b": 0.09}, *queue) == ["w3", "w2", "w1"]


def test_interactive_prompts_go_before_batch_ones_that_are_due_earlier() -> None:
    queue = [due("w1", "a", 101.0, slo_class="batch"), due("w2", "b", 109.0)]
    assert order({"a": 0.0, "b": 0.05}, *queue) == ["w2", "w1"]


def test_counters_are_level_within_one_promise_between_tokens() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.2))
    assert scheduler.share.turn(0.39) == scheduler.share.turn(0.21) != scheduler.share.turn(0.41)
