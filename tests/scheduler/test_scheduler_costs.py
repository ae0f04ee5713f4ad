"""The planner's questions are answered as the model itself would; a plan takes no longer than its state is large."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from scheduler_world import Stream, Sweep, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.costs import Costs
from coserve.scheduler.features import (
    ForwardLoad,
    attention_work,
    backward_vector,
    base_vector,
    coarse,
    head_vector,
    slice_vector,
)
from coserve.scheduler.state import RequestState, SchedulerState, SweepJob


def taught() -> Scheduler:
    """A scheduler that has served and trained in a world of its own."""
    scheduler, world = Scheduler(SchedulerConfig(itl_seconds=0.3)), World(blocks=400, itl=0.3, seed=3)
    for i in range(120):
        if not world.sweeps:
            world.sweeps = [Sweep(i, 200, 90, layers=4)]
        if i % 9 == 0:
            world.streams.append(Stream(f"s{i}", world.now, 30, 12))
        state = world.state()
        plan = scheduler.plan(state)
        parts = world.parts(plan)
        seconds = world.carry_out(plan)
        scheduler.observe(plan, state, max(seconds, sum(parts.values())), parts)
    return scheduler


def test_costs_are_the_models_own() -> None:
    model = taught().model
    costs, draw = Costs(model), random.Random(1)
    sweep = Sweep(0, 4096, 100, window=512, jobs=tuple(SweepJob(f"j{i}", "t", 1.0, "normal") for i in range(3))).state()
    for _ in range(50):
        rows, before, steps = draw.randint(1, 600), draw.randint(0, 4000), draw.randint(1, 31)
        load = ForwardLoad(draw.randint(0, 9), draw.randint(0, 900), logit_rows=draw.randint(0, 9), adapters=2)
        mean, deviation = model.part(base_vector(load))
        kind = "training" if load.rows else "alone"
        assert costs.serving(load) == pytest.approx((mean, model.margins.upper("decode", mean, deviation)))
        assert costs.base(load) == pytest.approx((mean, model.margins.upper(kind, mean, deviation)))
        ridden = load.with_ride(sweep, before, rows)
        assert ridden.ride_work == attention_work(before, rows) and ridden.adapters == 5
        mean, deviation = model.part(base_vector(ridden))
        assert costs.ride(load, sweep, before, rows) == pytest.approx(
            (mean, model.margins.upper(kind, mean, deviation))
        )
        for cost, vector in (
            (costs.slice(rows, steps, 32), slice_vector(rows, steps / 32)),
            (costs.backward(rows, before, rows), backward_vector(rows, coarse(before))),
        ):
            mean, deviation = model.part(vector)
            assert cost == pytest.approx((mean, model.margins.boost * mean + deviation))
        mean, upper = costs.head(rows, steps, 32, rows)
        assert mean == pytest.approx(model.part(head_vector(rows, steps / 32))[0])
        whole, deviation = model.part(head_vector(rows, 1.0))
        assert upper <= model.margins.boost * whole + deviation + 1e-12, "a part takes no longer than the whole"


def test_what_is_found_is_the_largest_that_fits() -> None:
    """Against trying everything."""
    model, draw = taught().model, random.Random(2)
    sweep, load = Sweep(0, 4096, 100, window=512).state(), ForwardLoad(4, 400, logit_rows=4)
    for _ in range(60):
        costs, left, before = Costs(model), draw.uniform(0.0, 0.3), draw.randint(1, 4000)
        sizes = tuple(sorted({draw.randint(1, 600) for _ in range(9)}, reverse=True))
        which, todo = draw.randint(0, 1), draw.randint(1, 32)
        backward = costs.largest_backward(sizes, before, sizes[0], left, which)
        fitting = [n for n in sizes if costs.backward(n, before - n, sizes[0])[which] <= left]
        assert (backward and backward[0]) == (fitting[0] if fitting else None)
        ride = costs.largest_ride(load, sweep, before, sizes, left, which)
        fitting = [n for n in sizes if costs.ride(load, sweep, before, n)[which] <= left]
        assert (ride and ride[0]) == (fitting[0] if fitting else None)
        piece = costs.largest_slice(sizes, todo, 32, left, which)
        moved = [n * sum(costs.slice(n, k, 32)[which] <= left for k in range(1, todo + 1)) for n in sizes]
        assert (piece[0] * piece[1] if piece else 0) == max(moved)


def test_a_decode_step_by_its_streams_is_the_models_own() -> None:
    model = taught().model
    seconds = Costs(model).decoding(context=300)
    for n in (1, 2, 3, 7, 16, 17, 100, 1000, 3000, 4096):
        load = ForwardLoad(decode_rows=n, decode_context=300 * n, logit_rows=n)
        assert seconds(n) == pytest.approx(model.part(base_vector(load))[0])


def test_a_margin_leaves_training_its_part_of_the_room() -> None:
    model = taught().model
    for _ in range(60):  # half of the iterations take 0.2 s longer than they should
        model.margins.observe("training", 0.1, 1.0, 0.3)
    costs, load = Costs(model), ForwardLoad(4, 400, logit_rows=4)
    mean, upper = costs.base(load)
    assert upper > mean + 0.09
    costs.leave_room(load, mean + 0.04, 0.75)
    assert costs.margin(load) == pytest.approx(0.03)
    assert costs.base(load)[1] == pytest.approx(upper - model.margins.upper("training", 0.0, 0.0) + 0.03)
    costs.leave_room(load, 0.5 * mean, 0.75)
    assert costs.margin(load) == 0.0, "no room, nothing to share"
    costs.begin()
    assert costs.base(load) == pytest.approx((mean, upper))


def test_the_model_is_asked_again_after_it_has_learned() -> None:
    scheduler = taught()
    costs = Costs(scheduler.model)
    before = costs.slice(64, 8, 32), costs.base(ForwardLoad(4)), costs.backward(64, 0, 64)
    scheduler.model._theta *= 2.0
    assert (costs.slice(64, 8, 32), costs.base(ForwardLoad(4)), costs.backward(64, 0, 64)) == before
    costs.begin()
    after = costs.slice(64, 8, 32), costs.base(ForwardLoad(4)), costs.backward(64, 0, 64)
    assert [b[0] for b in after] == pytest.approx([2.0 * a[0] for a in before])


def crowd(size: int, now: float) -> SchedulerState:
    """`size` streams, four times as many waiting requests, and a sweep for every five streams."""
    requests = tuple(
        RequestState(
            request_id=f"r{i}", tenant=f"t{i % 37}", weight=1.0, slo_class="interactive", arrived=0.001 * i,
            total_tokens=301 if i < size else 900, computed_tokens=300 if i < size else 0,
            output_tokens=9 if i < size else 0, blocks_held=19 if i < size else 0, adapter=f"a{i * 31 % (20 * size)}",
            adapter_ready=i < size or i % 2 == 0, ttft_deadline=now + 9.0,
            itl_deadline=now + 0.3 if i < size else None, running=i < size,
        )
        for i in range(5 * size)
    )  # fmt: skip
    sweeps = tuple(Sweep(i, 4096, 900, layers=32, window=512, forwarded=8 * i).state() for i in range(size // 5))
    return SchedulerState(now, requests, sweeps, 9000, 16, size + 2, size + 32)


def test_planning_takes_no_longer_than_the_state_is_large() -> None:
    """CPU time of the thread. The bounds are wide: what they catch is work that grows with requests times sweeps."""

    def seconds(size: int) -> float:
        scheduler, times = taught(), []
        for i in range(12):
            state = crowd(size, float(i))
            began = time.thread_time()
            plan = scheduler.plan(state)
            times.append(time.thread_time() - began)
            assert len(plan.decodes) == size
        return statistics.median(times)

    small, large = seconds(60), seconds(240)
    assert large < 6.5 * small and large < 0.010
