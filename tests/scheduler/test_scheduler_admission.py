"""Who may run: decodes, preemption, the queue's order, memory and adapters."""

from __future__ import annotations

from dataclasses import replace

from scheduler_states import chunks, prompt, request, state, stream

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.state import Plan, Prefill, RequestState


def plan(*args: RequestState, **kwargs: object) -> Plan:
    return Scheduler(SchedulerConfig(itl_seconds=1e6)).plan(state(*args, **kwargs))


def test_all_running_streams_decode_whatever_the_budget_says() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e-9))
    late = [replace(stream(f"s{i}"), itl_deadline=0.0) for i in range(40)]
    assert scheduler.plan(state(*late, running=40)).decodes == tuple(f"s{i}" for i in range(40))


def test_a_stream_that_needs_a_block_takes_those_of_the_newest() -> None:
    made = plan(stream("s1", 33, blocks=2), stream("s2"), stream("s3"), request("w4"), free=0)
    assert made.preempt == ("s3",) and made.decodes == ("s1", "s2")
    assert not made.prefills, "nobody is admitted while blocks are being taken back"


def test_the_newest_steps_back_itself_and_older_ones_are_left_alone() -> None:
    made = plan(stream("s1"), stream("s2"), stream("s3", 33, blocks=2), free=0)
    assert made.preempt == ("s3",) and made.decodes == ("s1", "s2")


def test_batch_streams_step_back_before_interactive_ones() -> None:
    made = plan(stream("s1", slo_class="batch"), stream("s2", 33, blocks=2), stream("s3"), free=0)
    assert made.preempt == ("s1",) and made.decodes == ("s2", "s3")


def test_blocks_that_others_share_are_not_counted_as_freed() -> None:
    made = plan(stream("s1", 33, blocks=2), stream("s2"), stream("s3", blocks_shared=2), free=0)
    assert made.preempt == ("s3", "s2") and made.decodes == ("s1",)


def test_a_stream_that_outgrew_the_whole_cache_is_named_and_does_not_block_training() -> None:
    made = plan(stream("s1", 33, blocks=2), free=0)
    assert made.unservable == ("s1",) and not made.preempt and not made.decodes


def test_a_prompt_larger_than_the_empty_cache_is_named_and_blocks_nobody() -> None:
    made = plan(request("w1", total_tokens=200), request("w2"), free=4)
    assert made.unservable == ("w1",) and chunks(made) == {"w2": 20}


def test_a_waiting_prompt_that_does_not_fit_is_not_overtaken() -> None:
    made = plan(stream("s1"), request("w2", total_tokens=90), request("w3"), free=4)
    assert made.decodes == ("s1",) and not made.prefills and not made.unservable


def test_admission_leaves_what_running_prompts_still_need() -> None:
    halfway = prompt("p1", 32, 640, blocks=2)
    assert chunks(plan(halfway, request("w2", total_tokens=16), free=38)) == {"p1": 512}
    assert chunks(plan(halfway, request("w2", total_tokens=16), free=40)) == {
        "p1": 512
    }  # all tokens are the first one's
    short = prompt("p1", 32, 64, blocks=2)
    assert chunks(plan(short, request("w2", total_tokens=16), free=3)) == {"p1": 32}  # 2 needed, 1 reserved, 0 left
    assert chunks(plan(short, request("w2", total_tokens=16), free=4)) == {"p1": 32, "w2": 16}


def test_places_limit_admission_in_order() -> None:
    assert chunks(plan(stream("s1"), request("w2"), request("w3"), running=2)) == {"w2": 20}


def test_interactive_prompts_go_first_and_each_class_in_order() -> None:
    made = plan(request("w1", slo_class="batch"), request("w2"), request("w3", slo_class="batch"), request("w4"))
    assert [p.request_id for p in made.prefills] == ["w2", "w4", "w1", "w3"]


def test_an_overdue_batch_request_counts_as_interactive_with_all_of_its_tenant_before_it() -> None:
    batch = {"slo_class": "batch"}
    made = plan(
        request("w1", **batch), request("w2"), request("w3", ttft_deadline=1.0, **batch), request("w4", **batch)
    )
    assert [p.request_id for p in made.prefills] == ["w3", "w1", "w2", "w4"]


def test_prompts_that_hold_all_blocks_do_not_wait_for_each_other_for_ever() -> None:
    made = plan(prompt("p1", 32, 64, blocks=2), prompt("p2", 32, 64, blocks=2), free=0)
    assert made.preempt == ("p2",) and chunks(made) == {"p1": 32}


def test_a_request_whose_adapter_is_loading_is_passed_over() -> None:
    made = plan(request("w1", adapter="a", adapter_ready=False), request("w2", adapter="b"), request("w3"))
    assert chunks(made) == {"w2": 20, "w3": 20}
    assert made.adapters == ("b", "a"), "what is in use first, then what is waited for"


def test_no_more_adapters_at_once_than_the_pool_holds() -> None:
    made = plan(
        stream("s1", adapter="a"), request("w2", adapter="b"), request("w3", adapter="c"), request("w4", adapter="a")
    )
    assert chunks(made) == {"w2": 20, "w4": 20}
    assert made.adapters == ("a", "b")


def test_a_long_blocked_adapter_drains_the_pool() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e6, drain_after=1.0))
    busy = [stream("s1", adapter="a"), stream("s2", adapter="b"), request("w3", adapter="c", adapter_ready=False)]
    newer = [request("w4", adapter="a"), request("w5")]
    assert chunks(scheduler.plan(state(*busy, *newer, now=100.0))) == {"w4": 20, "w5": 20}
    made = scheduler.plan(state(*busy, *newer, now=101.5))
    assert chunks(made) == {"w5": 20}, "only the base passes while the pool drains"
    # One of the two ended: the place is kept for the claimant while its adapter loads, …
    made = scheduler.plan(state(busy[0], busy[2], *newer, now=101.6))
    assert made.adapters == ("a", "c")
    assert chunks(made) == {"w4": 20, "w5": 20}, "the other place still serves its adapter"
    made = scheduler.plan(state(busy[0], busy[2], request("w4", adapter="b"), now=101.7))
    assert not made.prefills, "a third adapter would take the claimant's place"
    # … and the claimant is served as soon as it is there.
    made = scheduler.plan(state(busy[0], replace(busy[2], adapter_ready=True), *newer, now=101.8))
    assert chunks(made) == {"w3": 20, "w4": 20, "w5": 20}


def test_an_adapter_that_has_a_place_and_no_room_drains_the_pool() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e6, drain_after=1.0))
    busy = [stream("s1", adapter="a"), request("w2", adapter="large", adapter_ready=False, adapter_kept_out=True)]
    newer = [request("w3", adapter="a"), request("w4", adapter="b"), request("w5")]
    assert chunks(scheduler.plan(state(*busy, *newer, now=100.0, adapters=9))) == {"w3": 20, "w4": 20, "w5": 20}
    later = state(*busy, *newer, now=101.5, adapters=9)
    assert chunks(scheduler.plan(later)) == {"w5": 20}, "only the base passes while the pool drains"
    assert "those in use" in scheduler.queue(later)[0].reason
    there = replace(busy[1], adapter_ready=True, adapter_kept_out=False)
    assert chunks(scheduler.plan(state(there, *newer, now=101.6, adapters=9))).keys() == {"w2", "w3", "w4", "w5"}


def test_a_chunk_keeps_running_streams_inside_their_budget_and_goes_on_over_it_only_when_late() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.3))
    sample = state(*(stream(f"s{i}") for i in range(4)), prompt("p9", 0, 1000, blocks=80))
    for rows in (0, 1, 8, 64, 256, 508) * 12:
        prefills = (Prefill("p9", rows),) if rows else ()
        made = Plan(decodes=tuple(f"s{i}" for i in range(4)), prefills=prefills)
        scheduler.observe(made, sample, 0.05 + 0.001 * rows)
    now = 100.0

    def at(budget: float, deadline: float, *behind: RequestState) -> int:
        streams = [replace(stream(f"s{i}"), itl_deadline=now + budget) for i in range(4)]
        first = prompt("p9", 0, 1000, blocks=80, ttft_deadline=deadline)
        made = scheduler.plan(state(*streams, first, *behind, now=now))
        assert len(made.decodes) == 4
        return sum(chunks(made).values())

    assert 128 <= at(0.3, now + 1e6) < 256
    assert 32 <= at(0.15, now + 1e6) < 100
    assert at(0.03, now + 1e6) == 0, "no room and no hurry"
    assert at(0.03, now + 0.5) == 16, "the first token would be late"
    behind = request("w10", tenant="other", ttft_deadline=now + 0.5)
    assert at(0.03, now + 1e6, behind) == 16, "that of a prompt behind it would be"
    assert at(0.03, now + 1e6, replace(behind, ttft_deadline=now + 1e6)) == 0
    assert at(0.03, now + 1e6, replace(behind, adapter="a", adapter_ready=False)) == 0, "that waits for something else"
    places = [prompt(f"p{i}", 0, 20, blocks=2, adapter="a", adapter_ready=False) for i in (11, 12, 13)]
    assert at(0.03, now + 1e6, *places, behind) == 0, "nor is a place in the candidates' hands"
    alone = scheduler.plan(state(prompt("p9", 0, 1000, blocks=80), now=now))
    assert chunks(alone) == {"p9": 512}, "without streams nothing is held back"
