"""Whose turn it is: counters, the order of prompts, victims and sweeps, who pays, and the crowd rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_states import CREDIT, chunks, meet, prompt, request, share_of, state, stream, sweep

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.crowd import Crowd, largest_crowd
from coserve.scheduler.device_cost import device_cost, prices, serving_loads, total
from coserve.scheduler.fairness import FairShare
from coserve.scheduler.lineup import Lineup
from coserve.scheduler.state import (
    BackwardUnit,
    Plan,
    Prefill,
    RequestState,
    Ride,
    SweepJob,
    TenantLimit,
)


def scheduler_with(served: dict[str, float], **config: float) -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e6, **config))
    scheduler.share = share_of(served)
    return scheduler


def names(lineup: Lineup) -> list[str]:
    return [r.request_id for r in lineup]


# --------------------------------------------------------------------------- counters


def test_a_tenant_that_comes_back_is_lifted_to_who_stayed_less_the_credit() -> None:
    share = share_of({"a": 10.0, "b": 2.0, "c": 30.0})
    meet(share, state(request("w1", tenant="a"), request("w2", tenant="c")))
    assert share.served("b") == 2.0, "who is away is not charged and not lifted"
    meet(share, state(request("w1", tenant="a"), request("w2", tenant="b"), request("w3", tenant="c")))
    assert share.served("b") == 10.0 - CREDIT and share.served("a") == 10.0 and share.served("c") == 30.0
    meet(share, state(request("w1", tenant="a"), request("w3", tenant="d")))
    assert share.served("d") == 10.0 - CREDIT, "a newcomer begins where a returning one does"


def test_a_tenant_that_was_served_more_keeps_its_counter_while_it_is_away() -> None:
    share = share_of({"a": 10.0, "b": 50.0})
    meet(share, state(request("w1", tenant="a")))
    meet(share, state(request("w1", tenant="a"), request("w2", tenant="b")))
    assert share.served("b") == 50.0


def test_who_comes_to_an_empty_server_begins_where_the_last_ones_left() -> None:
    share = share_of({"a": 10.0, "b": 12.0})
    meet(share, state())
    meet(share, state(request("w1", tenant="c")))
    assert share.served("c") == 10.0 - CREDIT


def test_who_only_trains_is_no_measure_for_who_asks_and_saves_up_nothing() -> None:
    training = (sweep(jobs=(SweepJob("j", "t", 1.0, "low"),)),)

    def there(*tenants: str):
        return replace(state(*(request("w1", tenant=t) for t in tenants)), sweeps=training)

    share = FairShare(CREDIT, 60.0)
    meet(share, there("a"))
    share.charge({"a": 50.0, "t": 1.0})
    meet(share, there("a", "b"))
    assert share.served("b") == 50.0 - CREDIT and share.is_least("b") and not share.is_least("a")
    meet(share, there())
    meet(share, there("c"))
    assert share.served("c") == 50.0 - 2 * CREDIT, "nor does it matter that nobody asked meanwhile"
    assert share.served("t") == 1.0 < share.served("new") + 2 * CREDIT, "who comes to train begins beside who trains"
    meet(share, there("c", "t"))
    assert share.served("t") == 50.0 - 3 * CREDIT


def test_charges_are_divided_by_weight_and_strangers_pay_nothing() -> None:
    share = share_of({"a": 0.0, "b": 0.0}, {"a": 3.0})
    share.charge({"a": 6.0, "b": 6.0, "calibration": 9.0})
    assert share.served("a") == 2.0 and share.served("b") == 6.0


def test_thousands_of_tenants_that_came_and_went_are_forgotten() -> None:
    share = FairShare(CREDIT, 60.0)
    for i in range(5000):
        meet(share, replace(state(request("w1", tenant=f"t{i}"), request("w2", tenant="a")), now=float(i)))
        share.charge({f"t{i}": 0.001, "a": 0.5})
    assert len(share._served) < 200 and len(share._lately) <= 64
    assert share.served("a") == pytest.approx(2500.0)


# --------------------------------------------------------------------------- order


def test_prompts_take_turns_by_what_their_tenants_had_and_are_given() -> None:
    share = share_of({"a": 0.05, "b": 0.0})
    share.row_seconds = 0.001  # a prompt of 20 tokens: 0.02
    queue = [request(f"w{i}", tenant="a") for i in range(1, 5)] + [request(f"w{i}", tenant="b") for i in range(5, 10)]
    assert names(Lineup(state(*queue), share)) == ["w5", "w6", "w7", "w1", "w8", "w2", "w9", "w3", "w4"]
    heavy = [replace(r, weight=3.0) if r.tenant == "a" else r for r in queue]
    assert names(Lineup(state(*heavy), share))[:8] == ["w5", "w6", "w7", "w1", "w2", "w8", "w3", "w4"]


def test_a_tenants_own_requests_go_by_deadline_and_then_by_arrival() -> None:
    queue = [request("w1", ttft_deadline=109.0), request("w2", ttft_deadline=104.0), request("w3", ttft_deadline=109.0),
             request("w4", ttft_deadline=103.0)]  # fmt: skip
    assert names(Lineup(state(*queue), share_of({"t": 0.0}))) == ["w4", "w2", "w1", "w3"]


def test_a_flood_of_overdue_requests_gives_no_claim_over_another_tenant() -> None:
    share = share_of({"a": 5.0, "b": 0.0})
    late = [request(f"w{i}", tenant="a", ttft_deadline=1.0) for i in range(1, 9)]
    assert names(Lineup(state(*late, request("w9", tenant="b")), share))[0] == "w9"


def test_the_most_served_tenants_newest_stream_gives_its_blocks_back() -> None:
    streams = [stream("s1", tenant="a"), stream("s2", 33, blocks=2, tenant="b"), stream("s3", tenant="a"),
               stream("s4", tenant="b")]  # fmt: skip
    made = scheduler_with({"a": 9.0, "b": 1.0}).plan(state(*streams, free=0))
    assert made.preempt == ("s3",) and set(made.decodes) == {"s1", "s2", "s4"}
    made = scheduler_with({"a": 1.0, "b": 9.0}).plan(state(*streams, free=0))
    assert made.preempt == ("s4",)


def test_the_least_served_tenants_sweep_trains_first() -> None:
    def of(number: int, tenant: str):
        job = SweepJob(f"j{number}", tenant, 1.0, "normal")
        return sweep(number, jobs=(job,), forward_tokens=200, head_rows_left=0)

    scheduler = scheduler_with({"a": 9.0, "b": 1.0})
    plan = scheduler.plan(replace(state(), sweeps=(of(0, "a"), of(1, "b"))))
    assert plan.units[0].sweep_id == 1


# --------------------------------------------------------------------------- who pays


def test_an_iterations_seconds_are_all_paid_and_each_for_its_own() -> None:
    scheduler = Scheduler(SchedulerConfig())
    mine = SweepJob("j0", "c", 1.0, "normal")
    there = replace(
        state(stream("s1", 40, tenant="a"), stream("s2", 40, tenant="b"), prompt("p3", 0, 64, 4, tenant="b")),
        sweeps=(sweep(0, jobs=(mine,)), sweep(1, jobs=(replace(mine, tenant="a"),), forward_tokens=200)),
    )
    plan = Plan(decodes=("s1", "s2"), prefills=(Prefill("p3", 64),), rides=(Ride(0, 16),), units=(BackwardUnit(1, 8),))
    cost = device_cost(plan, there, 1.0, {0: 0.1, 1: 0.3}, scheduler.model)
    assert sum(cost.values()) == pytest.approx(1.0)
    assert cost["c"] == pytest.approx(0.1) and cost["a"] > 0.3 and cost["b"] > 10 * (cost["a"] - 0.3)
    assert device_cost(Plan(units=(BackwardUnit(1, 8),)), there, 0.5, {1: 0.4}, scheduler.model) == {"a": 0.5}


def test_what_decodes_read_of_the_cache_is_paid_by_who_reads_it() -> None:
    model = Scheduler(SchedulerConfig()).model
    plan = Plan(decodes=("s1", "s2"))
    there = {r.request_id: r for r in (stream("s1", 40_000, blocks=2500, tenant="a"), stream("s2", 40, tenant="b"))}
    loads = serving_loads(plan, there, model.traits)
    price = prices(model, total(loads.values()))
    assert price.of(loads["a"]) > price.of(loads["b"]) + 30_000 * price.context > price.of(loads["b"])


def test_tenants_that_share_a_sweep_pay_by_their_rows() -> None:
    jobs = (SweepJob("j0", "a", 1.0, "normal", rows=150), SweepJob("j1", "b", 1.0, "normal", rows=50))
    there = replace(state(), sweeps=(sweep(0, jobs=jobs),))
    plan = Plan(rides=(Ride(0, 64),))
    cost = device_cost(plan, there, 0.8, {0: 0.8}, Scheduler(SchedulerConfig()).model)
    assert cost == {"a": pytest.approx(0.6), "b": pytest.approx(0.2)}


# --------------------------------------------------------------------------- shares


def limited(*requests: RequestState, limit: TenantLimit, tenant: str = "a", **kwargs: int) -> Plan:
    made = replace(state(*requests, **kwargs), limits={tenant: limit})
    return Scheduler(SchedulerConfig(itl_seconds=1e6)).plan(made)


def test_a_tenant_at_its_share_of_blocks_waits_for_itself_and_others_go_on() -> None:
    queue = [request(f"w{i}", tenant="a", total_tokens=32) for i in (1, 2, 3)] + [request("w4", tenant="b")]
    assert chunks(limited(*queue, limit=TenantLimit(blocks=5))) == {"w1": 32, "w2": 32, "w4": 20}
    running = prompt("p0", 16, 64, blocks=1, tenant="a")
    assert chunks(limited(running, *queue, limit=TenantLimit(blocks=5))) == {"p0": 48, "w4": 20}, (
        "a running prompt counts as a whole"
    )


def test_a_stream_that_outgrows_its_tenants_share_takes_blocks_of_its_own_tenant() -> None:
    streams = [stream("s1", 33, blocks=2, tenant="a"), stream("s2", tenant="b"), stream("s3", tenant="a"),
               stream("s4", tenant="b")]  # fmt: skip
    made = limited(*streams, limit=TenantLimit(blocks=4), free=50)
    assert made.preempt == ("s3",) and set(made.decodes) == {"s1", "s2", "s4"}
    alone = limited(stream("s1", 33, blocks=2, tenant="a"), stream("s2", tenant="b"), limit=TenantLimit(blocks=2))
    assert alone.unservable == ("s1",) and alone.decodes == ("s2",)


def test_a_prompt_larger_than_its_tenants_share_is_named() -> None:
    queue = [request("w1", tenant="a", total_tokens=100), request("w2", tenant="a")]
    made = limited(*queue, limit=TenantLimit(blocks=6))
    assert made.unservable == ("w1",) and chunks(made) == {"w2": 20}


def test_a_tenants_adapters_stay_inside_its_pages_and_one_always_fits() -> None:
    def asks(name: str, adapter: str, pages: int, tenant: str = "a") -> RequestState:
        return request(name, tenant=tenant, adapter=adapter, adapter_pages=pages)

    queue = [asks("w1", "x", 3), asks("w2", "y", 2), asks("w3", "x", 3), asks("w4", "z", 9, "b")]
    assert chunks(limited(*queue, limit=TenantLimit(adapter_pages=4), adapters=5)) == {"w1": 20, "w3": 20, "w4": 20}
    assert set(chunks(limited(*queue, limit=TenantLimit(adapter_pages=5), adapters=5))) == {"w1", "w2", "w3", "w4"}
    assert set(chunks(limited(*queue, limit=TenantLimit(adapter_pages=1), adapters=5))) == {"w1", "w3", "w4"}


def test_an_adapter_kept_out_by_its_tenants_pages_gets_its_turn() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e6, drain_after=1.0))
    limits = {"a": TenantLimit(adapter_pages=1)}
    busy = [stream("s1", tenant="a", adapter="x", adapter_pages=1)]
    queue = [
        request("w2", tenant="a", adapter="y", adapter_pages=1),
        request("w3", tenant="a", adapter="x", adapter_pages=1),
    ]
    assert set(chunks(scheduler.plan(replace(state(*busy, *queue), limits=limits)))) == {"w3"}
    later = replace(state(*busy, *queue, now=101.5), limits=limits)
    assert not scheduler.plan(later).prefills, "nobody of the tenant passes it any more"
    assert set(chunks(scheduler.plan(replace(state(*queue, now=101.6), limits=limits)))) >= {"w2"}


# --------------------------------------------------------------------------- the crowd, and the queue as told


def test_a_crowd_leaves_room_for_others_and_one_tenant_alone_is_not_limited() -> None:
    assert [largest_crowd(lambda n: 0.01 * n, limit) for limit in (0.001, 0.01, 0.135, 1.0)] == [1, 1, 13, 100]
    running = [request(f"w{i}", tenant="a") for i in range(6)]
    crowd = Crowd(lambda n: 0.01 * n, 0.065, 0.095, lambda whole: {"a": whole / 2, "b": whole / 2})
    crowd.begin(running)
    assert not crowd.has_room("a", least_served=False)
    assert crowd.has_room("a", least_served=True) and crowd.has_room("b", least_served=False)
    alone = Crowd()
    alone.begin(running)
    assert alone.has_room("a", least_served=False)


def test_a_flood_is_admitted_as_far_as_prompts_of_others_keep_their_room() -> None:
    def admitted(*others: RequestState) -> int:
        scheduler = Scheduler(SchedulerConfig(itl_seconds=0.2))
        streams = [stream(f"s{i}", tenant="a") for i in range(40)]
        for count in (1, 2, 4, 8, 16, 32) * 8:
            plan = Plan(decodes=tuple(f"s{i}" for i in range(count)))
            scheduler.observe(plan, state(*streams), 0.02 + 0.01 * count)
        flood = [request(f"w{i}", tenant="a", total_tokens=1) for i in range(30)]
        made = scheduler.plan(state(*others, *flood, running=64))
        return sum(p.request_id.startswith("w") for p in made.prefills)

    assert admitted() == 30
    share = FairShare(CREDIT, 60.0)
    meet(share, replace(state(request("w1", tenant="a")), sweeps=(sweep(jobs=(SweepJob("j", "b", 1.0, "normal"),)),)))
    assert share.tenants == 2 and not share.shared, "who only trains has no first tokens to protect"
    assert 8 <= admitted(stream("s0", tenant="b")) <= 12, "as many as decode in 60% of the promise"


def test_who_waits_is_told_its_place_why_and_for_how_long() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e6))
    waiting = [request(f"w{i}") for i in range(2, 6)]
    now = state(stream("s1"), *waiting, running=1)
    scheduler.plan(now)
    told = scheduler.queue(now)
    assert [(q.request_id, q.position, q.wait_seconds) for q in told] == [(f"w{i}", i - 1, None) for i in range(2, 6)]
    assert "place" in told[0].reason
    scheduler.plan(state(stream("s1"), *waiting, running=2, now=104.0))  # w2 was admitted, after four seconds
    later = state(stream("s1"), stream("s2"), *waiting[1:], running=2, now=104.1)
    scheduler.plan(later)
    assert [q.wait_seconds for q in scheduler.queue(later)] == [4.0, 8.0, 12.0]
    loading = state(request("w1", adapter="x", adapter_ready=False))
    scheduler.plan(loading)
    assert "loaded" in scheduler.queue(loading)[0].reason
