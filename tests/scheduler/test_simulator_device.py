"""The simulated device refuses what a real engine could not do, and its costs are those of its card."""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, replace

import pytest

from coserve.scheduler.plan_features import plan_load
from coserve.scheduler.simulation.cards import Curve, Noise, cards
from coserve.scheduler.simulation.device import Device
from coserve.scheduler.simulation.streams import BrokenPlan, Stream, Sweep
from coserve.scheduler.state import BackwardUnit, ForwardUnit, HeadUnit, Plan, Prefill, Ride, SweepJob
from coserve.scheduler.traits import Traits

CARD = cards()["cpu-270m"].quiet()


def device(**changes: object) -> Device:
    """A stream in decode, one that waits, a sweep with a window part-way through the layers, one in backward."""
    made = Device(replace(CARD, layers=4, head_steps=4), blocks=8, max_running=2, max_adapters=1, **changes)
    decoding = Stream("d", 0.0, 60, 9, generated=1, computed=60, blocks=4, running=True, last_token=0.0, first_at=0.0)
    waiting = Stream("w", 0.0, 40, 9, adapter="a")
    made.streams = [decoding, waiting]
    made.sweeps = [
        Sweep(0, 100, 40, window=32, head_steps=4, forwarded=64, partial=32, partial_layer=2),
        Sweep(1, 64, 10, window=32, head_steps=4, forwarded=64, headed=10),
    ]
    made.resident.last_use = {"a": 0.0}
    return made


def test_a_plan_that_fits_is_carried_out() -> None:
    d = device()
    plan = Plan(
        decodes=("d",), prefills=(Prefill("w", 32),),
        units=(ForwardUnit(0, 32, 2), HeadUnit(0, 36, 3), BackwardUnit(1, 32), BackwardUnit(1, 32)),
    )  # fmt: skip
    expected = d.seconds(plan)
    seconds, parts = d.run(plan)
    assert (
        seconds == pytest.approx(expected) == pytest.approx(d.now) == pytest.approx(sum(parts.values()) + CARD.overhead)
    )
    assert set(parts) == {"forward", 0, 1, 2, 3}
    first, second = d.streams
    assert (first.generated, first.computed, first.blocks, first.last_token) == (2, 61, 4, d.now)
    assert (second.computed, second.blocks, second.running, second.generated) == (32, 2, True, 0)
    assert d.gaps == [pytest.approx(seconds)] and d.free == 2
    assert (d.sweeps[0].forwarded, d.sweeps[0].batch, d.sweeps[0].batch_steps) == (96, 36, 3)
    assert (d.sweeps[1].layer, d.sweeps[1].layer_rows) == (2, 0)


@pytest.mark.parametrize(
    "plan, why",
    [
        (Plan(decodes=("w",)), "not in decode"),
        (Plan(decodes=("d",), preempt=("d",)), "named twice"),
        (Plan(preempt=("w",)), "does not run"),
        (Plan(unservable=("w",)), "unservable"),
        (Plan(prefills=(Prefill("d", 1),)), "is in decode"),
        (Plan(prefills=(Prefill("w", 41),)), "no 41 tokens"),
        (Plan(prefills=(Prefill("w", 0),)), "no 0 tokens"),
        (Plan(rides=(Ride(0, 4),)), "overtake"),
        (Plan(rides=(Ride(1, 4),)), "not there"),
        (Plan(rides=(Ride(1, 4), Ride(1, 4))), "two rides"),
        (Plan(units=(ForwardUnit(0, 16, 1),)), "changed its size"),
        (Plan(units=(ForwardUnit(0, 32, 3),)), "over the last layer"),
        (Plan(units=(HeadUnit(0, 5, 1),)), "label rows that are not there"),
        (Plan(units=(ForwardUnit(0, 32, 2), HeadUnit(0, 36, 5))), "over its batch's end"),
        (Plan(units=(BackwardUnit(0, 8),)), "before forward and head"),
        (Plan(units=(BackwardUnit(1, 33),)), "larger than a window"),
        (Plan(units=(BackwardUnit(1, 32), BackwardUnit(1, 31), BackwardUnit(1, 2))), "crossed a layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_that_does_not_fit_is_refused(plan: Plan, why: str) -> None:
    with pytest.raises(BrokenPlan, match=why):
        device().run(plan)


def test_blocks_places_and_residency_are_limits() -> None:
    d = device(reserved=3)
    with pytest.raises(BrokenPlan, match="over the blocks"):
        d.run(Plan(prefills=(Prefill("w", 32),)))
    d = device()
    d.streams.append(Stream("x", 0.0, 4, 4))
    with pytest.raises(BrokenPlan, match="more requests run"):
        d.run(Plan(prefills=(Prefill("w", 8), Prefill("x", 4))))
    d = device()
    d.resident.last_use = {"b": 0.0}
    with pytest.raises(BrokenPlan, match="not resident"):
        d.run(Plan(prefills=(Prefill("w", 8),)))
    with pytest.raises(BrokenPlan, match="more adapters are wanted"):
        d.load_adapter(("a", "b"))
    assert d.load_adapter(("a",)) and set(d.resident) == {"a"} and not d.load_adapter(("a",))


def test_a_preempted_stream_gives_its_blocks_back_and_keeps_its_tokens() -> None:
    d = device()
    d.run(Plan(preempt=("d",), prefills=(Prefill("w", 40),)))
    victim = d.streams[0]
    assert (victim.running, victim.blocks, victim.computed, victim.total) == (False, 0, 0, 61)
    assert d.streams[1].generated == 1 and d.free == 5


def test_an_adapter_waits_for_its_blocks_and_an_idle_one_gives_them_back() -> None:
    d = device()
    d.max_adapters = d.resident.places = 2
    d.resident.sizes, d.resident.last_use = {"a": 3, "b": 1}, {"b": 0.0}
    assert not d.load_adapter(("b", "a")), "3, 1 of the one ahead of it and 2 of a stream: 4 are free"
    state = d.state()
    assert (state.free_blocks, state.adapter_blocks) == (4, 6) and state.requests[1].adapter_kept_out
    d.streams[0].running, d.streams[0].blocks, d.streams[0].computed = False, 0, 0
    assert d.load_adapter(("b", "a")) and d.state().adapter_blocks == 0
    waits = d.state().requests[1]
    assert (d.free, waits.adapter_ready, waits.blocks_adapter, waits.adapter_kept_out) == (8, True, 3, False)
    d.run(Plan(prefills=(Prefill("w", 40),)))
    assert d.free == 2 and set(d.resident) == {"a", "b"}, "b is idle"
    d.run(Plan(prefills=(Prefill("d", 32),)))
    assert d.free == 0 and set(d.resident) == {"a"}, "its blocks were needed"
    d.streams[1].running, d.streams[1].blocks, d.streams[1].computed = False, 0, 0
    d.reserved = 4
    with pytest.raises(BrokenPlan, match="used over the blocks"):
        d.run(Plan(prefills=(Prefill("w", 16),)))


def test_labels_stand_at_the_end_of_every_sequence() -> None:
    sweep = Sweep(0, 10, 2, sequence=4)  # rows 2, 3, 6, 7, and 8, 9 of a last sequence of two
    assert [sweep._labels_before(n) for n in range(11)] == [0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 6]
    assert sweep.work(6, 6) == (1 + 2 + 3 + 4) + (1 + 2), "attention stays within a sequence"
    assert Sweep(0, 10, 3).all_labels == 3


def test_a_curve_is_straight_between_its_points_and_counts_whole_tiles() -> None:
    curve = Curve(((1, 1.0), (9, 2.0), (13, 4.0)), tile=4)
    assert [curve(n) for n in (1, 4, 5, 8, 9, 12, 16, 20)] == [1.375, 1.375, 1.875, 1.875, 3.5, 3.5, 5.5, 7.5]
    for points, tile in (((1, 1.0),), 1), (((2, 1.0), (2, 2.0)), 1), (((1, 1.0), (2, 2.0)), 0):
        with pytest.raises(ValueError, match="curve"):
            Curve(points, tile)


def test_noise_is_as_wide_as_it_says() -> None:
    rng = random.Random(1)
    noise = Noise(0.05, 0.02, (2.0, 3.0))
    drawn = [noise.draw(rng, 0.5) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(0.5, abs=0.003)
    assert sum(s > 0.75 for s in drawn) / len(drawn) == pytest.approx(0.02, rel=0.2) and max(drawn) < 1.8
    assert {Noise().draw(rng, 2.0) for _ in range(9)} == {2.0}


def test_the_device_counts_what_the_scheduler_counts() -> None:
    """By code of its own: windows, adapters of several sizes, graphs."""
    card = replace(CARD, layers=4, head_steps=4, windows=(16, None, 50, 16), graph_rows=(2, 4))
    d = device(pages={"a": 7})
    d.card, d.sweeps = (
        card,
        [Sweep(0, 200, 40, window=64, forwarded=64, jobs=(SweepJob("j", "t", 1.0, "normal", 0, 3),))],
    )
    d.__post_init__()
    d.streams.append(Stream("e", 0.0, 30, 9, "batch", "a", generated=1, computed=30, blocks=2, running=True))
    traits = Traits(card.windows, card.graph_rows)
    requests, sweeps = {r.request_id: r for r in d.state().requests}, {0: d.state().sweeps[0]}
    for plan in (
        Plan(decodes=("d", "e")), Plan(decodes=("d",), prefills=(Prefill("w", 40),)),
        Plan(decodes=("d", "e"), prefills=(Prefill("w", 12),), rides=(Ride(0, 64),)),
    ):  # fmt: skip
        mine, its = d.load(plan), plan_load(plan, requests, sweeps, traits)
        assert asdict(mine) == pytest.approx(asdict(its))
    assert d.load(Plan(decodes=("d", "e"))).graph_rows == 2


def test_a_stall_takes_as_long_whatever_it_meets() -> None:
    noise = Noise(stall_share=0.1, stall_seconds=(0.02, 0.04))
    for seconds in (0.05, 0.5):
        late = [s - seconds for s in (noise.draw(random.Random(i), seconds) for i in range(3000)) if s > seconds]
        assert len(late) / 3000 == pytest.approx(0.1, rel=0.15)
        assert 0.02 <= min(late) < 0.021 and 0.039 < max(late) <= 0.0401


@pytest.mark.parametrize("name", ["cpu-270m", "h200-8b"])
def test_no_card_charges_less_for_more(name: str) -> None:
    card = cards()[name]
    for curve in (card.forward, card.logits, card.head, card.backward):
        costs = [curve(rows) for rows in range(1, 1200)]
        assert costs == sorted(costs) and costs[0] > 0.0


def test_the_h200_card_stays_under_the_ceilings_it_is_made_of() -> None:
    card = cards()["h200-8b"]
    assert card.forward(1) >= 16e9 / 4.3e12
    a_token = (card.forward(2048) + card.layers * card.backward(2048)) / 2048
    assert a_token > 4 * 8e9 / 790e12, "training would need more than all the FLOP there are"
