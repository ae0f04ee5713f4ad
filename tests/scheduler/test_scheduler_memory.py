"""What training gives back, when it gets memory again, and who is protected."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_states import chunks, prompt, request, step, stream, there, worked_on

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.admission import BLOCKS
from coserve.scheduler.memory import REQUESTS_HOLD, STEP_DUE, STEPS_HOLD, TOO_LARGE
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepState

CONFIG = SchedulerConfig(itl_seconds=1e6)
CLAIM = CONFIG.memory_claim_after
NEEDY = stream("s1", 33, blocks=2)  # its next token needs a block


def plan(*who: RequestState | SweepState, **changes: object) -> Plan:
    return Scheduler(CONFIG).plan(there(*who, **changes))


# --------------------------------------------------------------------------- give back


def test_a_sweep_falls_back_before_one_is_parked_and_one_is_parked_before_a_request_steps_back() -> None:
    made = plan(NEEDY, stream("s2"), step(0, 9, lean=8), free=0)
    assert (made.lean, made.park, made.preempt, made.decodes) == ((0,), (), (), ("s1", "s2"))
    made = plan(NEEDY, stream("s2"), step(0, 9), free=0)
    assert (made.lean, made.park, made.preempt, made.decodes) == ((), (0,), (), ("s1", "s2"))
    made = plan(NEEDY, stream("s2"), free=0)
    assert made.preempt == ("s2",)


def test_what_is_parked_does_not_run_and_what_fell_back_may() -> None:
    made = plan(NEEDY, step(0, 5), step(1, 9), free=0)
    assert made.park == (1,) and worked_on(made) <= {0}
    assert worked_on(plan(NEEDY, step(0, 9, lean=5), free=0)) == {0}


def test_nothing_is_given_back_while_blocks_are_free() -> None:
    due = request("w2", ttft_deadline=100.0)
    made = plan(NEEDY, due, step(0, 9, lean=3), free=4)
    assert not (made.lean or made.park) and chunks(made) == {"w2": 20}
    made = plan(NEEDY, due, step(0, 9, lean=3), free=3)  # one of the stream, two of the prompt, one of the reserve
    assert made.lean == (0,) and chunks(made) == {"w2": 20}


def test_a_prompt_gets_the_blocks_of_training_for_all_of_its_tokens_and_only_if_they_are_enough() -> None:
    long = request("w1", total_tokens=160, ttft_deadline=100.0)
    made = plan(long, step(0, 6), step(1, 6), free=4)
    assert made.park == (1,) and chunks(made) == {"w1": 160}
    scheduler = Scheduler(CONFIG)
    full = there(stream("s0", 320, blocks=20), long, step(0, 3), step(1, 2), free=4)
    assert not scheduler.plan(full).park and scheduler.queue(full)[0].reason == BLOCKS


@pytest.mark.parametrize("lacking,parked", [
    (1, (5,)),  # low before normal
    (4, (2,)),  # one of three and one of four would do: one of four alone does
    (6, (5, 2)), (7, (5, 2)),
    (8, (2, 1)),  # two are enough; the low one with any other is not
    (11, (5, 2, 1)),
    (40, (5, 2, 1, 0)),
])  # fmt: skip
def test_as_few_as_possible_are_parked_low_ones_first_then_the_newest(lacking: int, parked: tuple[int, ...]) -> None:
    sweeps = [step(0, 4), step(1, 4), step(2, 4), step(5, 3, priority="low")]
    if lacking == 40:
        needy = prompt("p1", 16, 16 * 41, 1)
    else:
        needy = prompt("p1", 16, 16 * (lacking + 1), 1)
    assert plan(needy, *sweeps, free=0).park == parked


def test_the_most_served_tenant_is_parked_first() -> None:
    scheduler = Scheduler(CONFIG)
    sweeps = step(0, 4, tenant="a"), step(1, 4, tenant="b"), step(2, 4, tenant="c")
    scheduler.plan(there(*sweeps))
    scheduler.share.charge({"a": 1.0, "b": 3.0, "c": 2.0})
    assert scheduler.plan(there(NEEDY, *sweeps, free=0)).park == (1,)


def test_others_fall_back_where_that_spares_one_from_being_parked() -> None:
    made = plan(prompt("p1", 16, 16 * 14, 1), step(0, 10, lean=4), step(1, 10, lean=4), free=0)
    assert made.park == (1,) and made.lean == (0,)  # 13 are lacking, both together fall back by 12
    made = plan(prompt("p1", 16, 16 * 13, 1), step(0, 10, lean=4), step(1, 10, lean=4), free=0)
    assert not made.park and made.lean == (1, 0)


def test_a_step_that_ends_before_a_prompt_is_due_keeps_its_blocks() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=0.5))
    ends = replace(step(0, 9), forward_tokens=200, head_rows_left=0, backward_layer=0)
    streaming = replace(stream("s0"), itl_deadline=100.5)
    for due, waits in ((200.0, True), (100.001, False)):
        made = scheduler.plan(there(streaming, request("w1", ttft_deadline=due), ends, step(7, 1, since=99.0), free=1))
        assert bool(made.park) != waits and bool(made.prefills) != waits
        assert not made.place, "room was made, or waited for, and then given away"
    short = there(streaming, NEEDY, request("w2", ttft_deadline=200.0), ends, free=0)
    assert scheduler.plan(short).park == (0,), "a running stream cannot wait"
    far = replace(ends, backward_layer=3, stream_tokens=10**6, forward_tokens=10**6)
    assert scheduler.plan(there(streaming, request("w1", ttft_deadline=101.0), far, free=1)).park == (0,)


def test_a_copy_has_the_iteration_to_itself_and_teaches_the_model_nothing() -> None:
    scheduler = Scheduler(SchedulerConfig(itl_seconds=1e6, floor_share=0.0))
    came = there(NEEDY, step(0, 5), step(1, 9), free=0)
    made = scheduler.plan(came)
    assert made.park == (1,) and not worked_on(made)
    known = scheduler.model.observations
    scheduler.observe(made, came, 3.0)
    assert scheduler.model.observations == known and scheduler.share.served("t") == 3.0


# --------------------------------------------------------------------------- take


def test_a_new_sweep_gets_its_blocks_and_runs_at_once() -> None:
    made = plan(step(0, 9, since=100.0), free=9)
    assert made.place == (0,) and worked_on(made) == {0}
    made = plan(step(0, 9, since=100.0), free=8)
    assert not made.place and made.empty


def test_a_sweep_leaves_room_for_streams_and_for_prompts_that_are_next() -> None:
    small = SchedulerConfig(itl_seconds=1e6, max_chunk=20)
    who = stream("s1"), stream("s2"), step(0, 9, since=100.0)
    assert plan(*who, free=13).place == (0,) and not plan(*who, free=12).place
    queue = request("w3"), request("w4", total_tokens=40)  # 2 blocks now; 3 more, 1 of the reserve and 2 a stream
    assert Scheduler(small).plan(there(*who, *queue, free=19)).place == (0,)
    made = Scheduler(small).plan(there(*who, *queue, free=18))
    assert chunks(made) == {"w3": 20} and not made.place
    late = replace(queue[1], adapter="x", adapter_ready=False)
    assert Scheduler(small).plan(there(*who, queue[0], late, free=16)).place == (0,), "it waits for something else"


def test_nothing_is_placed_while_a_prompt_lacks_blocks_or_one_steps_back() -> None:
    assert not plan(stream("s0"), request("w1", total_tokens=200), step(0, 1, since=100.0), free=12).place
    made = plan(NEEDY, stream("s2", 90), step(0, 1, since=100.0), free=0)
    assert made.preempt == ("s2",) and not made.place


def test_training_never_gets_more_than_its_part() -> None:
    made = plan(step(0, 5), step(1, 5, since=99.0), step(2, 1, since=99.5), free=90, activations=10)
    assert made.place == (1,), "the third would be one too many"
    made = plan(step(0, 5), step(1, 6, since=99.0), step(2, 1, since=99.5), free=90, activations=10)
    assert not made.place, "none is placed past one that does not fit"
    assert plan(step(1, 11, since=99.0), step(2, 1, since=99.5), free=90, activations=10).place == (2,), "it never will"


def test_the_least_served_tenant_is_next_normal_before_low_and_who_waited_very_long_before_all() -> None:
    scheduler = Scheduler(CONFIG)
    waiting = (
        step(0, 4, tenant="a", since=99.0), step(1, 4, tenant="b", since=99.0),
        step(2, 4, tenant="c", priority="low", since=99.0), step(3, 9, tenant="d"),
    )  # fmt: skip
    scheduler.plan(there(*waiting, free=0))
    scheduler.share.charge({"a": 2.0, "b": 1.0})
    for count, placed in ((1, (1,)), (2, (1, 0)), (3, (1, 0, 2))):
        assert scheduler.draft(there(*waiting, free=4 * count)).plan.place == placed
    long = replace(waiting[2], unplaced_since=100.0 - 8 * CLAIM)
    assert scheduler.plan(there(*waiting[:2], long, waiting[3], free=4)).place == (2,)


def test_a_parked_sweep_rests_twice_as_long_each_time_and_then_stays() -> None:
    scheduler, now = Scheduler(CONFIG), 100.0
    other = step(9, 2)  # so that nobody claims
    for rest in (0.5, 1.0, 2.0, 4.0):
        assert scheduler.plan(there(NEEDY, other, step(0, 9), free=0, now=now)).park == (0,)
        parked = step(0, 9, since=now)
        assert not scheduler.plan(there(NEEDY, other, parked, now=now + 0.99 * rest)).place
        assert scheduler.plan(there(NEEDY, other, parked, now=now + rest)).place == (0,)
        now += 10.0
    made = scheduler.plan(there(NEEDY, stream("s2"), step(0, 9), free=0, now=now))
    assert made.preempt == ("s2",) and not made.park


# --------------------------------------------------------------------------- claim


def claiming(since: float = 100.0 - CLAIM, *more: RequestState, now: float = 100.0, free: int = 5) -> SchedulerState:
    return there(stream("s1", 80, blocks=6), request("w2"), *more, step(0, 9, since=since), free=free, now=now)


def test_a_step_that_has_waited_keeps_prompts_back_until_it_fits() -> None:
    scheduler = Scheduler(CONFIG)
    early = claiming(100.1 - CLAIM)
    assert chunks(scheduler.plan(early)) == {"w2": 20}
    made = scheduler.plan(claiming())
    assert made.decodes == ("s1",) and not made.prefills and not made.place
    assert scheduler.queue(claiming())[0].reason == STEP_DUE
    made = scheduler.plan(claiming(free=9))
    assert made.place == (0,) and scheduler.memory.protected == 0
    made = scheduler.plan(there(stream("s1", 80, blocks=6), request("w2"), step(0, 9), free=5))
    assert chunks(made) == {"w2": 20}, "once it has its blocks, prompts are admitted again"


def protecting() -> Scheduler:
    scheduler = Scheduler(CONFIG)
    assert scheduler.plan(claiming(free=9)).place == (0,)
    return scheduler


def test_a_protected_sweep_keeps_its_blocks_and_requests_step_back_for_each_other() -> None:
    scheduler = protecting()
    made = scheduler.plan(there(NEEDY, stream("s2"), step(0, 9, lean=1), free=0))
    assert made.preempt == ("s2",) and made.decodes == ("s1",) and not (made.park or made.lean)
    made = scheduler.plan(there(NEEDY, stream("s2"), step(0, 9, lean=1), step(1, 3), free=0))
    assert made.park == (1,) and not (made.preempt or made.lean), "others are not protected"


def test_requests_that_lack_what_a_protected_sweep_holds_wait_for_its_end() -> None:
    scheduler = protecting()
    alone = scheduler.plan(there(NEEDY, step(0, 9), free=0))
    assert not (alone.unservable or alone.preempt or alone.decodes) and worked_on(alone) == {0}
    large = scheduler.plan(there(request("w1", total_tokens=160), step(0, 9), free=1))
    assert not (large.unservable or large.prefills) and worked_on(large) == {0}
    assert scheduler.plan(there(request("w1", total_tokens=161), step(0, 9), free=1)).unservable == ("w1",)
    stuck = scheduler.plan(there(prompt("p1", 32, 40, 2), step(0, 9), free=0))
    assert not (stuck.unservable or stuck.preempt)


def test_after_a_protected_step_requests_have_their_time() -> None:
    scheduler = protecting()
    scheduler.plan(there(stream("s1", 80, blocks=6), step(0, 9), now=110.0))
    for now, closed in ((120.0, False), (119.9 + CLAIM, False), (120.0 + CLAIM, True)):
        made = scheduler.plan(replace(claiming(90.0, now=now), sweeps=(step(1, 9, since=90.0),)))
        assert bool(made.prefills) != closed


def test_nobody_is_kept_back_for_a_step_that_cannot_fit_or_while_another_one_trains() -> None:
    far = replace(claiming(), activation_blocks=8)
    gone = replace(claiming(), sweeps=(step(0, 12, since=0.0),))  # 11 with all that runs: something else has the rest
    trains = replace(claiming(), sweeps=(step(0, 9, since=0.0), step(1, 1)))
    for there_is in (far, gone, trains):
        assert Scheduler(CONFIG).plan(there_is).prefills


# --------------------------------------------------------------------------- beside the rest of the plan


def test_sweeps_that_wait_for_memory_neither_run_nor_are_owed_time() -> None:
    assert worked_on(plan(stream("s1"), step(0, 50, since=100.0), step(1, 5, tenant="u"), free=0)) == {1}
    for waits in (None, 100.0):
        scheduler = Scheduler(SchedulerConfig(itl_seconds=1e-6))
        came, worked = there(stream("s1"), step(0, 5, since=waits), free=0), set()
        for _ in range(300):  # until the floor would have paid for a unit
            made = scheduler.plan(came)
            worked |= worked_on(made)
            scheduler.observe(made, came, 0.1)
        assert worked == ({0} if waits is None else set())
        if waits is not None:
            assert not worked_on(scheduler.plan(there(stream("s1"), step(0, 5))))


def test_a_tenant_whose_only_step_waits_is_there_and_keeps_its_turn() -> None:
    scheduler = Scheduler(CONFIG)
    waits, trains = step(0, 50, tenant="a", since=100.0), step(1, 5, tenant="b")
    for now in (100.0, 101.0, 102.0):
        came = there(waits, trains, free=0, now=now)
        scheduler.observe(scheduler.plan(came), came, 10.0)
    assert scheduler.share.served("a") == 0.0 < scheduler.share.served("b")
    scheduler.plan(there(replace(waits, placed=True), trains, now=103.0))
    assert scheduler.share.served("a") == 0.0, "it was not lifted as one that comes back"


def test_why_a_sweep_waits() -> None:
    came = there(step(0, 5), step(1, 5, since=1.0), step(2, 6, since=1.0), step(3, 11, since=1.0), activations=10)
    waits = {1: REQUESTS_HOLD, 2: STEPS_HOLD, 3: TOO_LARGE}
    assert Scheduler(CONFIG).sweep_waits(came) == waits
