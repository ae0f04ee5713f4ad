"""What is learned of output lengths, and who is admitted by it: as many as will have blocks to the end, no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_states import chunks, request, state, stream

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.admission import BLOCKS
from coserve.scheduler.outputs import _MOMENTS, Outputs
from coserve.scheduler.policy import Draft
from coserve.scheduler.state import Plan, RequestState, SchedulerState

ENOUGH = 8
CONFIG = SchedulerConfig(itl_seconds=1e6, known_outputs=ENOUGH)
NOTHING = state()


def running(*requests: RequestState) -> tuple[Plan, SchedulerState]:
    return Plan(decodes=tuple(r.request_id for r in requests)), state(*requests)


def learned(lengths: list[int], *, tenant: str = "t", into: Outputs | None = None) -> Outputs:
    """Outputs of these lengths have ended, one after the other."""
    outputs = into or Outputs(ENOUGH, 0.5)
    for i, length in enumerate(lengths):
        outputs.note(*running(made(f"o{i}", length - 1, tenant=tenant)))
        outputs.note(Plan(), NOTHING)
    return outputs


def made(name: str, outputs: int, **changes: object) -> RequestState:
    """A stream in decode with so many output tokens after a prompt of 16."""
    return replace(stream(name, 16 + outputs), output_tokens=outputs, **changes)


def scheduler(lengths: list[int]) -> Scheduler:
    """One that has seen outputs of these lengths end, beside a stream that stays."""
    planner = Scheduler(CONFIG)
    for i, length in enumerate(lengths):
        for there in ((made("stays", 1), made(f"o{i}", length - 1)), (made("stays", 1),)):
            planner.observe(planner.plan(state(*there)), state(*there), 0.01)
    return planner


def test_what_runs_outside_of_plans_is_nobodys_output() -> None:
    planner = Scheduler(CONFIG)
    for i in range(40):
        planner.observe(*running(made(f"o{i}", 199)), 0.01)
    there = state(*GROWING, request("w9"), free=20)
    assert chunks(planner.plan(there)) == {"w9": 20}, "as long as nothing is known"


def need(outputs: Outputs, one: RequestState, after: int) -> float:
    """Mean blocks beyond those held, so many tokens from now."""
    return float(outputs.needs((one,), 16)[0][list(_MOMENTS).index(after)])


def test_only_who_is_gone_has_ended() -> None:
    outputs = Outputs(1, 0.5)
    one, two = made("s1", 40), made("s2", 90)
    outputs.note(*running(one, two))
    preempted = replace(one, running=False, computed_tokens=0, blocks_held=0)
    outputs.note(Plan(decodes=("s2",)), state(preempted, two))
    assert not outputs.known, "one that was preempted waits and goes on"
    outputs.note(Plan(decodes=("s2",)), state(two))
    assert outputs.known, "until its client leaves"


def test_a_stream_goes_on_as_those_did_that_came_as_far() -> None:
    outputs = learned([8] * 30 + [512] * 30)
    fresh, grown = made("s1", 1), made("s2", 40)  # 2 and 4 blocks with the next token, 1 and 4 held
    assert need(outputs, grown, 192) == pytest.approx(12.0, abs=0.5), "all that came to 40 went on to 512"
    assert need(outputs, fresh, 192) == pytest.approx(0.5 * (2 + 12) - 1, abs=1.0), "half of all do"
    assert need(outputs, grown, 512) < -3.0, "and then they end, and what they hold is free"


def test_nobody_makes_more_than_its_client_allows() -> None:
    outputs = learned([512] * 20)
    short = made("s1", 40, most_output=64)
    assert need(outputs, short, 16) == pytest.approx(1.0, abs=0.1)
    assert need(outputs, short, 24) == -4.0, "gone, with the blocks that it has now"


def test_tenants_with_enough_of_their_own_are_told_apart_and_others_go_by_all() -> None:
    outputs = learned([256] * 20, tenant="long", into=learned([8] * 40, tenant="short"))
    found = {t: need(outputs, made("s1", 1, tenant=t), 128) for t in ("short", "new", "long")}
    assert found["short"] < 0.5 < found["new"] < found["long"] - 1.0
    unknown = learned([256] * (ENOUGH - 1), tenant="few", into=outputs)
    few, new = (need(unknown, made("s1", 1, tenant=t), 128) for t in ("few", "new"))
    assert few == new, "too few to go by"


def test_long_ones_under_way_are_not_forgotten_for_the_short_ones_that_ended_first() -> None:
    outputs = Outputs(ENOUGH, 0.5)
    long = [made(f"l{i}", 300) for i in range(20)]
    for i in range(20):
        outputs.note(*running(*long, made(f"s{i}", 8)))
        outputs.note(*running(*long))
    assert need(outputs, made("new", 1), 128) > 3.0, "half of all come past 128, to 10 blocks"


def test_more_tenants_than_are_remembered_do_not_mix_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coserve.scheduler.outputs._MOST_KEYS", 2)
    outputs = Outputs(ENOUGH, 0.5)
    for tenant, length in (("a", 8), ("b", 256), ("c", 512), ("b", 256)):
        learned([length] * 20, tenant=tenant, into=outputs)
    first, second, third, nobody = (need(outputs, made("s1", 1, tenant=t), 128) for t in "abcd")
    assert first == nobody, "who learned nothing for longest is forgotten, and goes by all"
    assert second > 8.0 and third > 8.0


# ------------------------------------------------------------------ who is admitted

GROWING = [made(f"s{i}", 10) for i in range(3)]  # each holds 2 blocks, the second one for 6 tokens more


def test_a_prompt_waits_for_the_blocks_that_running_streams_will_come_to() -> None:
    there = state(*GROWING, request("w9"), free=20)
    assert chunks(Scheduler(CONFIG).plan(there)) == {"w9": 20}, "nothing is known: a reserve"
    assert chunks(scheduler([16] * 20).plan(there)) == {"w9": 20}, "they are about to end"
    planner = scheduler([200] * 20)
    kept = planner.plan(there)
    assert not kept.prefills and len(kept.decodes) == 3, "3 streams and itself, 12 blocks each"
    assert planner.queue(there)[0].reason == BLOCKS
    assert chunks(planner.plan(state(*GROWING, request("w9"), free=48))) == {"w9": 20}, "room for all of them"
    allowed = [replace(r, most_output=32) for r in GROWING]
    assert chunks(planner.plan(state(*allowed, request("w9"), free=20))) == {"w9": 20}, "their clients want less"


def test_streams_that_end_make_room_for_those_that_come() -> None:
    planner = scheduler([200] * 20)
    old = [made(f"s{i}", 190) for i in range(3)]  # 13 blocks each, free in ten iterations
    assert chunks(planner.plan(state(*old, request("w9"), free=6))) == {"w9": 20}


@pytest.mark.parametrize("free, joining", [(28, 0), (58, 2), (94, 5)])
def test_prompts_of_one_plan_count_for_each_other(free: int, joining: int) -> None:
    planner = scheduler([800] + [200] * 20)
    there = state(*GROWING, *(request(f"w{i}") for i in range(4, 9)), free=free, running=20)
    assert len(chunks(planner.plan(there))) == joining


def test_an_idle_device_admits_whatever_it_may_come_to() -> None:
    planner = scheduler([2000] * 20)
    assert chunks(planner.plan(state(request("w1"), request("w2"), free=4))) == {"w1": 20}


def test_a_plan_made_ahead_is_the_same_and_leaves_no_trace() -> None:
    one, other = scheduler([200] * 20), scheduler([200] * 20)
    for free in (20, 30, 40, 48, 60):
        there = state(*GROWING, request("w8"), request("w9"), free=free)
        draft = one.draft(there)
        assert isinstance(draft, Draft) and draft.plan == other.plan(there) == one.plan(there)
