"""An adapter that waits for blocks of the one store: who leaves them to it, who gives them back, and who does not."""

from __future__ import annotations

from dataclasses import replace

from scheduler_states import chunks, prompt, request, step, stream, there, worked_on

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.admission import ADAPTER_DUE, BLOCKS, RESIDENCY, ROOM
from coserve.scheduler.state import Plan, RequestState, SchedulerState, SweepState

CONFIG = SchedulerConfig(itl_seconds=1e6)
CLAIM = CONFIG.memory_claim_after
NEEDY = stream("s1", 33, blocks=2)  # its next token needs a block
LATE = request("w9", adapter="x", adapter_ready=False, adapter_kept_out=True, ttft_deadline=100.0)  # waits for the load


def plan(*who: RequestState | SweepState, **changes: object) -> Plan:
    return Scheduler(CONFIG).plan(there(*who, **changes))


def knowing(lengths: int = 20) -> Scheduler:
    """One that has seen outputs of 200 tokens end, beside a stream that stays."""
    planner = Scheduler(replace(CONFIG, known_outputs=8))
    stays = replace(stream("stays", 20), output_tokens=4)
    for i in range(lengths):
        ends = replace(stream(f"o{i}", 216), output_tokens=199)
        for who in ((stays, ends), (stays,)):
            planner.observe(planner.plan(there(*who)), there(*who), 0.01)
    return planner


# --------------------------------------------------------------------------- those that run


def test_who_runs_uses_every_free_block_and_nobody_steps_back_for_an_adapter() -> None:
    prompts = NEEDY, stream("s2"), prompt("p3", 16, 160, 1)
    streams = NEEDY, stream("s2"), stream("s3")
    for who, free in ((prompts, 9), (prompts, 1), (streams, 1), (streams, 0)):
        with_it, without = (plan(*who, free=free, due=due) for due in (50, 0))
        assert with_it == without and len(with_it.decodes) == 2 + (who is streams and free == 1)
    assert with_it.preempt == ("s3",)


# --------------------------------------------------------------------------- those that wait


def test_a_prompt_is_admitted_only_beside_what_the_adapter_needs() -> None:
    who = stream("s1"), request("w2"), LATE
    assert chunks(plan(*who, free=7, due=4)) == {"w2": 20}  # two of the prompt and one of the reserve
    scheduler = Scheduler(CONFIG)
    short = there(*who, free=6, due=4)
    made = scheduler.plan(short)
    assert made.decodes == ("s1",) and not made.prefills
    assert {q.request_id: q.reason for q in scheduler.queue(short)} == {"w2": ADAPTER_DUE, "w9": ROOM}


def test_a_prompt_says_what_really_keeps_it_back() -> None:
    for due, tokens, reason in ((4, 97, BLOCKS), (0, 97, BLOCKS), (4, 96, None), (1, 80, ADAPTER_DUE)):
        scheduler = Scheduler(CONFIG)
        came = there(stream("s1"), request("w2", total_tokens=tokens), free=6 if reason else 11, due=due)
        made = scheduler.plan(came)
        assert bool(made.prefills) == (reason is None)
        assert reason is None or scheduler.queue(came)[0].reason == reason
    scheduler = Scheduler(CONFIG)
    full = there(stream("s1", adapter="a"), replace(LATE, adapter_kept_out=False), free=6)
    scheduler.plan(replace(full, max_adapters=1))
    assert scheduler.queue(full)[0].reason == RESIDENCY, "it is a place that it lacks"


def test_a_forecast_leaves_what_the_adapter_needs_as_well() -> None:
    growing = [replace(stream(f"s{i}", 26), output_tokens=10) for i in range(3)]
    for due, free, joins in ((0, 39, True), (20, 58, False), (20, 59, True)):
        planner = knowing()
        came = there(*growing, request("w9"), free=free, due=due)
        assert bool(planner.plan(came).prefills) is joins
        assert joins or planner.queue(came)[0].reason == ADAPTER_DUE
    scarce = there(*growing, request("w9"), free=38, due=1)
    planner = knowing()
    assert not planner.plan(scarce).prefills and planner.queue(scarce)[0].reason == BLOCKS


def test_an_endless_row_of_small_prompts_does_not_keep_an_adapter_out() -> None:
    """Blocks of streams that end are left free until there are enough."""
    scheduler, running, free, number = Scheduler(CONFIG), [stream(f"s{i}") for i in range(4)], 2, 100
    for _ in range(4):
        came = there(*running, LATE, *(request(f"w{number + i}") for i in range(3)), free=free, due=10)
        assert not scheduler.plan(came).prefills
        running, free, number = running[1:], free + 2, number + 3
    assert free == 10, "now it is loaded"


def test_on_an_idle_device_the_adapter_goes_first_if_it_can_be_loaded_at_all() -> None:
    who = request("w1", total_tokens=64), LATE, step(0, 6)
    made = plan(*who, free=10, due=12)
    assert made.park == (0,) and chunks(made) == {"w1": 64}
    made = plan(*who, free=10, due=13)
    assert made.park == (0,) and not made.prefills, "nothing runs, and then it is loaded"
    for due in (17, 1000):  # more than there is, with the step's
        made = plan(*who, free=10, due=due)
        assert chunks(made) == {"w1": 64} and not made.park
    assert chunks(plan(*who[:2], free=10, due=11)) == {"w1": 64}
    assert plan(*who[1:], step(1, 3, since=99.0), free=10, due=17).place == (1,)


# --------------------------------------------------------------------------- training


def test_a_sweep_falls_back_for_an_adapter_or_else_is_parked() -> None:
    who = stream("s1"), LATE
    made = plan(*who, step(0, 9, lean=6), free=4, due=7)
    assert made.lean == (0,) and not made.park
    made = plan(*who, step(0, 9, lean=6), free=4, due=8)
    assert made.park == (0,) and not made.lean
    made = plan(*who, step(0, 9, lean=6), free=8, due=8)
    assert not (made.park or made.lean), "they are there"
    made = plan(NEEDY, LATE, step(0, 9, lean=6), free=8, due=8)
    assert made.lean == (0,), "one of them is for a stream"


def test_nothing_is_given_back_where_it_would_not_be_enough_or_streams_step_back() -> None:
    made = plan(stream("s1", 640, blocks=40), LATE, step(0, 9, lean=6), free=4, due=14)
    assert not (made.park or made.lean) and worked_on(made) == {0}
    made = plan(NEEDY, LATE, step(0, 9, lean=8), free=0, due=14)
    assert made.lean == (0,), "what a stream needs is given all the same"
    made = plan(NEEDY, stream("s2", 100), LATE, free=0, due=3)
    assert made.preempt == ("s2",)


def test_a_protected_sweep_gives_nothing() -> None:
    scheduler = Scheduler(CONFIG)
    claims = there(stream("s1", 80, blocks=6), step(0, 9, since=100.0 - CLAIM), free=9)
    assert scheduler.plan(claims).place == (0,)
    made = scheduler.plan(there(stream("s1", 80, blocks=6), LATE, step(0, 9), step(1, 3), free=4, due=6))
    assert made.park == (1,)
    made = scheduler.plan(there(stream("s1", 80, blocks=6), LATE, step(0, 9, lean=2), step(1, 3), free=4, due=8))
    assert not (made.park or made.lean)


def test_no_sweep_is_placed_into_what_the_adapter_needs() -> None:
    who = stream("s1"), step(0, 9, since=100.0)
    assert plan(*who, free=15, due=4).place == (0,) and not plan(*who, free=14, due=4).place
    claims = stream("s1"), step(0, 9, since=100.0 - CLAIM)
    assert plan(*claims, free=13, due=4).place == (0,) and not plan(*claims, free=12, due=4).place
    assert not plan(stream("s1"), request("w2"), LATE, step(0, 1, since=100.0), free=8, due=6).place, "w2 lacks blocks"


def test_a_step_that_ends_before_anybody_who_waits_is_late_keeps_its_blocks() -> None:
    ends = replace(step(0, 9), forward_tokens=200, head_rows_left=0, backward_layer=0)
    streaming = replace(stream("s0"), itl_deadline=100.5)
    for due, waits in ((200.0, True), (100.001, False)):
        made = plan(streaming, replace(LATE, ttft_deadline=due), ends, free=3, due=8)
        assert bool(made.park) != waits
        made = plan(
            streaming, replace(LATE, ttft_deadline=200.0), request("w2", ttft_deadline=due), ends, free=3, due=8
        )
        assert bool(made.park) != waits and bool(made.prefills) != waits, "it is kept back for the adapter"
    made = plan(streaming, ends, free=3, due=8)
    assert not made.park, "a job that is to begin can wait for the step's end"
    far = replace(ends, backward_layer=3, stream_tokens=10**6, forward_tokens=10**6)
    assert plan(streaming, replace(LATE, ttft_deadline=101.0), far, free=3, due=8).park == (0,)


# --------------------------------------------------------------------------- idle adapters, whose blocks count as free

IDLE = {"adapter": "a", "blocks_adapter": 5}


def test_who_wakes_an_idle_adapter_needs_its_blocks_too_and_only_the_first_one() -> None:
    running = stream("s1")
    assert chunks(plan(running, request("w2", **IDLE), free=8)) == {"w2": 20}  # five, two, and one of the reserve
    assert not plan(running, request("w2", **IDLE), free=7).prefills
    both = request("w2", **IDLE), request("w3", **IDLE)
    assert chunks(plan(running, *both, free=10)) == {"w2": 20, "w3": 20}
    assert chunks(plan(running, *both, free=9)) == {"w2": 20}
    uses = stream("s1", **IDLE)
    assert chunks(plan(uses, request("w2", **IDLE), free=3)) == {"w2": 20}, "it is awake"
    mixed = request("w2", **IDLE), request("w3", total_tokens=64)
    assert chunks(plan(running, *mixed, free=11)) == {"w2": 20}, "what it takes, nobody else gets"
    assert chunks(plan(running, *mixed, free=12)) == {"w2": 20, "w3": 64}


def test_training_gives_back_for_an_adapter_that_is_woken_and_leaves_it_to_prompts_behind() -> None:
    made = plan(stream("s1"), request("w2", ttft_deadline=100.0, **IDLE), step(0, 9, lean=5), free=4)
    assert made.lean == (0,) and chunks(made) == {"w2": 20}
    small = SchedulerConfig(itl_seconds=1e6, max_chunk=20)
    queue = request("w2"), request("w3", **IDLE)  # 2 blocks, then 2 and 5; 1 of the reserve, 2 for the stream
    for free, placed in ((16, (0,)), (15, ())):
        made = Scheduler(small).plan(there(stream("s1"), *queue, step(0, 4, since=100.0), free=free))
        assert chunks(made) == {"w2": 20} and made.place == placed


def test_a_request_that_does_not_fit_with_its_adapter_is_named() -> None:
    assert plan(request("w1", total_tokens=80, **IDLE), free=9).unservable == ("w1",)
    assert chunks(plan(request("w1", total_tokens=80, **IDLE), free=10)) == {"w1": 80}


def test_a_forecast_counts_the_woken_adapter() -> None:
    growing = [replace(stream(f"s{i}", 26), output_tokens=10) for i in range(3)]
    for free, joins in ((42, False), (43, True)):
        came = there(*growing, request("w9", adapter="a", blocks_adapter=4), free=free)
        assert bool(knowing().plan(came).prefills) is joins
    woken = request("w8", adapter="a", blocks_adapter=20), request("w9")
    for free, number in ((58, 0), (59, 1), (71, 1), (72, 2)):
        assert len(chunks(knowing().plan(there(*growing, *woken, free=free)))) == number, "the next one counts it too"


def test_a_step_claims_what_streams_and_their_adapters_give_back_when_they_end() -> None:
    late = step(0, 10, since=100.0 - CLAIM)
    for blocks, closed in ((2, True), (1, False)):
        users = (stream(f"s{i}", adapter="a", blocks_adapter=blocks) for i in range(2))
        assert bool(plan(*users, request("w2"), late, free=4).prefills) != closed  # and 4 of both


def test_states_of_other_adapters_are_other_states() -> None:
    came: SchedulerState = there(request("w1"))
    assert came != replace(came, adapter_blocks=1) != replace(came, requests=(request("w1", blocks_adapter=1),))
