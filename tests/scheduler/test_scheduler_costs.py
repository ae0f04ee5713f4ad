"""The planner's questions are answered as the model itself would; a plan takes no longer than its state is large."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import pytest
from scheduler_world import Stream, Sweep, World

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.costs import Costs
from coserve.scheduler.features import (
    ForwardLoad,
    backward_vector,
    base_vector,
    coarse,
    head_vector,
    overhead_vector,
    slice_vector,
)
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.plan_features import PlanFeatures
from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.state import RequestState, SchedulerState, SweepJob
from coserve.scheduler.traits import Traits

MIXED = SchedulerConfig(itl_seconds=0.3, layer_windows=(50, 50, None, 50), graph_rows=(1, 2, 4, 8, 12), usual_pages=3)


def taught(config: SchedulerConfig = MIXED) -> Scheduler:
    """A scheduler that has served and trained in a world of its own."""
    scheduler, world = Scheduler(config), World(blocks=400, itl=0.3, seed=3)
    for i in range(120):
        if not world.sweeps:
            world.sweeps = [Sweep(i, 200, 90, layers=4, jobs=(SweepJob("j", "t", 1.0, "normal", adapter_pages=5),))]
        if i % 9 == 0:
            world.streams.append(Stream(f"s{i}", world.now, 30, 12))
        state = world.state()
        plan = scheduler.plan(state)
        parts = world.parts(plan)
        seconds = world.carry_out(plan)
        scheduler.observe(plan, state, max(seconds, sum(parts.values())), parts)
    return scheduler


def standing(before: int, layer: int, pages: int = 0, rows: int = 4096) -> SweepProgress:
    """A sweep of 32 layers with `before` rows forwarded, and as many left in `layer` of its backward."""
    jobs = tuple(SweepJob(f"j{i}", "t", 1.0, "normal", i, pages * i) for i in range(3))
    sweep = Sweep(pages, rows, 100, layers=32, window=512, jobs=jobs, forwarded=before).state()
    return SweepProgress(replace(sweep, backward_layer=layer, backward_tokens=rows - before))


def test_costs_are_the_models_own() -> None:
    scheduler = taught()
    model, traits = scheduler.model, scheduler.traits
    costs, draw = Costs(model), random.Random(1)
    for _ in range(50):
        rows, before, steps = draw.randint(1, 600), draw.randint(600, 4000), draw.randint(1, 31)
        load = ForwardLoad(
            draw.randint(0, 9), draw.randint(0, 900), logit_rows=draw.randint(0, 9), adapters=2, adapter_sizes=1.5,
            adapter_rows=7.0, graph_rows=draw.choice([0, 12]),
        )  # fmt: skip
        mean, deviation = model.part(base_vector(load))
        kind = "training" if load.rows else "alone"
        assert costs.serving(load) == pytest.approx((mean, model.margins.upper("decode", mean, deviation)))
        assert costs.base(load) == pytest.approx((mean, model.margins.upper(kind, mean, deviation)))
        progress = standing(before, draw.randint(0, 3), pages=draw.randint(0, 9))
        sizes, passed = traits.adapters(progress.state)
        ridden = load.with_ride(progress.state, before, rows, traits)
        assert ridden.ride_work == traits.work(before, rows) and ridden.adapters == 5 and ridden.graph_rows == 0
        assert ridden.adapter_sizes == 1.5 + sizes and ridden.adapter_rows == 7.0 + rows * passed
        mean, deviation = model.part(base_vector(ridden))
        assert costs.ride(load, progress.state, before, rows) == pytest.approx(
            (mean, model.margins.upper(kind, mean, deviation))
        )
        work = traits.work(coarse(before), rows)
        window = traits.window(progress.backward_layer)
        for cost, vector in (
            (costs.slice(progress, rows, steps), slice_vector(rows, steps / 32, work, passed)),
            (costs.backward(progress, 512), backward_vector(512, coarse(before - 512), (window, passed))),
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
    load = ForwardLoad(4, 400, logit_rows=4, graph_rows=4)
    for _ in range(60):
        costs, left, before = Costs(model), draw.uniform(0.0, 0.3), draw.randint(600, 4000)
        progress = standing(before, draw.randint(0, 3), pages=draw.randint(0, 9))
        sizes = tuple(sorted({draw.randint(1, 600) for _ in range(9)}, reverse=True))
        which, todo = draw.randint(0, 1), draw.randint(1, 32)
        backward = costs.largest_backward(progress, sizes, left, which)
        fitting = [n for n in sizes if costs.backward(progress, n)[which] <= left]
        assert (backward and backward[0]) == (fitting[0] if fitting else None)
        ride = costs.largest_ride(load, progress.state, before, sizes, left, which)
        fitting = [n for n in sizes if costs.ride(load, progress.state, before, n)[which] <= left]
        assert (ride and ride[0]) == (fitting[0] if fitting else None)
        piece = costs.largest_slice(progress, sizes, todo, left, which)
        moved = [n * sum(costs.slice(progress, n, k)[which] <= left for k in range(1, todo + 1)) for n in sizes]
        assert (piece[0] * piece[1] if piece else 0) == max(moved)


def test_a_unit_is_priced_by_the_layer_it_is_in() -> None:
    """A lesson in which a layer that sees everything costs by what it sees, and one with a window does not."""
    model = LatencyModel(0.99, 0.9, 0.98, Traits((64, None)))
    costs = Costs(model)
    for before in (0, 256, 1024, 2048, 4096, 8192) * 3:
        for window in (64, None):
            x = backward_vector(256, before, (window, 0.0))
            seconds = 0.01 + (0.0 if window else 1e-8 * (256 * before + 256 * 257 / 2))
            model.observe(PlanFeatures(None, (x,), overhead_vector()), seconds + 0.001, {0: seconds})
    costs.begin()
    windowed, full = (costs.backward(standing(4096 + 256, layer, rows=8192), 256)[0] for layer in (0, 1))
    assert windowed == pytest.approx(0.01, rel=0.1) and full == pytest.approx(0.0208, rel=0.1)


@pytest.mark.parametrize("config", [SchedulerConfig(itl_seconds=0.3), MIXED])
def test_a_decode_step_by_its_streams_is_the_models_own(config: SchedulerConfig) -> None:
    scheduler = taught(config)
    model, traits = scheduler.model, scheduler.traits
    seconds = Costs(model).decoding(context=300)
    for n in (1, 2, 3, 5, 7, 12, 13, 14, 16, 17, 100, 1000, 3000, 4096):
        context = traits.context([300] * n)
        load = ForwardLoad(decode_rows=n, decode_context=context, logit_rows=n, graph_rows=traits.replayed(n))
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
    sweep = standing(64, 1)
    before = costs.slice(sweep, 64, 8), costs.base(ForwardLoad(4)), costs.backward(sweep, 64)
    scheduler.model._theta *= 2.0
    assert (costs.slice(sweep, 64, 8), costs.base(ForwardLoad(4)), costs.backward(sweep, 64)) == before
    costs.begin()
    after = costs.slice(sweep, 64, 8), costs.base(ForwardLoad(4)), costs.backward(sweep, 64)
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
