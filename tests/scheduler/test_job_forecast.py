"""When jobs will end, as the scheduler foretells it, held against simulated runs; and who shares training how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from coserve.scheduler import Scheduler, SchedulerConfig
from coserve.scheduler.forecast import JobForecast, JobWork, forecast
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.rates import TrainingRate, WorkShape
from coserve.scheduler.simulation import Setup, cards, simulate
from coserve.scheduler.simulation.workloads import ClosedLoop, Lengths, Trace, TrainingJob, Workload
from coserve.scheduler.state import Plan, Ride, SchedulerState, SweepJob, SweepState

CARD = cards()["cpu-270m"]
ITL = 0.2
SETUP = Setup(CARD, itl=ITL, ttft=4.0)
NOBODY = Trace([], 0)
JOB = TrainingJob("job", batch=4, length=128, labels=32, tenant="a", steps=9)


class Foretelling:
    """A scheduler that is asked about once a second of virtual time, as the engine asks it."""

    def __init__(self, jobs: tuple[TrainingJob, ...]) -> None:
        self.scheduler = Scheduler(SchedulerConfig(itl_seconds=ITL))
        self.jobs = jobs
        self.begun: dict[str, set[int]] = {job.name: set() for job in jobs}  # sweeps of each job so far
        self.told: list[tuple[float, dict[str, JobForecast]]] = []

    def plan(self, state: SchedulerState) -> Plan:
        for sweep in state.sweeps:
            for job in sweep.jobs:
                self.begun[job.job_id].add(sweep.sweep_id)
        plan = self.scheduler.plan(state)
        if not self.told or state.now >= self.told[-1][0] + 1.0:
            works = tuple(self._work(job, state) for job in self.jobs if self._there(job, state))
            self.told.append((state.now, {f.job_id: f for f in self.scheduler.forecast(works, state.sweeps)}))
        return plan

    def observe(self, plan: Plan, state: SchedulerState, seconds: float,
                parts: Mapping[int | str, float] | None = None) -> None:  # fmt: skip
        self.scheduler.observe(plan, state, seconds, parts)

    def _there(self, job: TrainingJob, state: SchedulerState) -> bool:
        live = any(j.job_id == job.name for s in state.sweeps for j in s.jobs)
        return job.arrives <= state.now and (live or len(self.begun[job.name]) < (job.steps or 0))

    def _work(self, job: TrainingJob, state: SchedulerState) -> JobWork:
        steps = (job.steps or 0) - len(self.begun[job.name])
        labels = steps * job.batch * job.labels
        shape = WorkShape(job.rows, SETUP.window, CARD.layers)
        return JobWork(job.name, job.tenant, job.weight, job.priority, shape, steps * job.rows, labels)


def foretold(workload: Workload, *jobs: TrainingJob, seconds: float, seed: int = 1) -> tuple[Foretelling, dict]:
    """What was foretold, and when each job ended."""
    asked = Foretelling(jobs)
    ledger = simulate(lambda: asked, SETUP, workload, jobs, seconds=seconds, seed=seed)
    assert all(job.finished for job in ledger.jobs), "the run is too short"
    return asked, {job.name: job.done for job in ledger.jobs}


def errors_after(asked: Foretelling, done: list[float], name: str, arrives: float, since: float = 0.0) -> list[float]:
    """Of each prediction from a third of the job on: its error as a share of all that was still to come."""
    begin = max(arrives + (done[-1] - arrives) / 3.0, since)
    return [
        (now + told[name].seconds - done[-1]) / (done[-1] - now)
        for now, told in asked.told
        if name in told and begin <= now < arrives + 0.9 * (done[-1] - arrives)
    ]


STREAMS = ClosedLoop(3, 0, Lengths(30, 20, 0.3), ttft=4.0)


@pytest.mark.parametrize("workload", [NOBODY, STREAMS], ids=["alone", "beside streams"])
def test_after_a_third_of_a_job_its_end_is_known_to_a_quarter(workload: Workload) -> None:
    asked, done = foretold(workload, JOB, seconds=600.0)
    errors = errors_after(asked, done["job"], "job", 0.0)
    print(done, errors, [round(t["job"].seconds + n, 1) for n, t in asked.told if "job" in t])
    assert len(errors) > 3 and max(map(abs, errors)) < 0.25


def test_a_second_job_of_another_tenant_is_reckoned_with_as_soon_as_it_has_begun() -> None:
    other = replace(JOB, name="other", tenant="b", weight=2.0, steps=4, arrives=6.0)
    asked, done = foretold(NOBODY, JOB, other, seconds=600.0)
    assert done["other"][-1] < done["job"][-1], "the first one must have the device to itself again"
    errors = errors_after(asked, done["job"], "job", 0.0, since=6.0)
    others = errors_after(asked, done["other"], "other", 6.0)
    assert len(errors) > 3 and max(map(abs, errors)) < 0.25
    assert len(others) > 3 and max(map(abs, others)) < 0.25


def test_a_job_is_foretold_before_its_first_step_is_done() -> None:
    asked, done = foretold(NOBODY, JOB, seconds=600.0)
    first = [(now, told["job"]) for now, told in asked.told if "job" in told and now < done["job"][0]]
    assert first, "nothing was said"
    for now, told in first:
        assert now + told.seconds == pytest.approx(done["job"][-1], rel=0.5)
        assert told.tokens_per_second == pytest.approx(JOB.rows * len(done["job"]) / done["job"][-1], rel=0.5)


# --------------------------------------------------------------------------- who has how much of the rate

MODEL = LatencyModel(0.99, 0.9, 0.98)


def work(name: str, steps: int, *, tenant: str = "a", weight: float = 1.0, priority: str = "normal",
         stream: int = 256) -> JobWork:  # fmt: skip
    return JobWork(name, tenant, weight, priority, WorkShape(stream, 256, 4), steps * stream, steps * 64)


def ends(*jobs: JobWork, sweeps: tuple[SweepState, ...] = (), speed: float = 0.5, floor: float = 0.02) -> list[float]:
    return [one.seconds for one in forecast(jobs, sweeps, MODEL, 64, speed, floor)]


def test_work_takes_longer_by_what_training_does_not_get() -> None:
    (alone,) = ends(work("x", 10), speed=1.0)
    assert ends(work("x", 10), speed=0.25) == [pytest.approx(4 * alone)]
    assert ends(work("x", 20), speed=1.0) == [pytest.approx(2 * alone)]


def test_tenants_share_by_weight_and_the_last_one_has_all() -> None:
    (alone,) = ends(work("x", 10))
    heavy, light = ends(work("x", 10, tenant="a", weight=3.0), work("y", 10, tenant="b"))
    assert heavy == pytest.approx(alone * 4 / 3) and light == pytest.approx(2 * alone)


def test_jobs_of_a_tenant_take_turns_step_by_step() -> None:
    small, large = ends(work("x", 10), work("y", 10, stream=512))
    assert small == pytest.approx(large), "as many steps of each"
    (one, *_) = forecast((work("x", 10), work("y", 10, tenant="b"), work("z", 10)), (), MODEL, 64, 0.5, 0.02)
    (alone,) = forecast((work("x", 10),), (), MODEL, 64, 0.5, 0.02)
    assert one.tokens_per_second == pytest.approx(alone.tokens_per_second / 4)


def test_low_jobs_wait_for_normal_ones_but_for_the_floor() -> None:
    (alone,) = ends(work("x", 10))
    normal, low = ends(work("x", 10), work("y", 10, priority="low"))
    assert normal == pytest.approx(alone * 0.5 / 0.48) and low == pytest.approx(2 * alone)
    assert ends(work("x", 10), work("y", 10, priority="low"), floor=0.0) == [pytest.approx(alone), pytest.approx(low)]


def test_sweeps_under_way_count_as_far_as_they_are_not_done() -> None:
    job = SweepJob("x", "a", 1.0, "normal")
    whole = SweepState(1, (job,), 4, 256, 256, 0, 0, 0, 0, 64, backward_layer=3)
    (step,) = ends(work("x", 1))
    (both,) = ends(work("x", 1), sweeps=(whole,))
    assert both == pytest.approx(2 * step)
    half = replace(whole, forward_tokens=256, head_rows_left=0, backward_layer=1)
    (rest,) = ends(work("x", 1), sweeps=(half,))
    assert step < rest < 1.6 * step
    shared = replace(whole, jobs=(job, replace(job, job_id="y")))
    assert ends(work("x", 0), sweeps=(shared,)) == [pytest.approx(step / 2)]
    assert ends(work("x", 0), sweeps=(replace(half, backward_layer=-1),)) == [0.0]


# --------------------------------------------------------------------------- the rate


def test_the_rate_forgets_with_the_last_job_and_counts_the_pauses_between_steps() -> None:
    sweep = SweepState(1, (SweepJob("x", "a", 1.0, "normal"),), 4, 256, 256, 0, 0, 0, 0, 64, backward_layer=3)
    quiet = SchedulerState(0.0, (), (), 10, 16, 8, 8)
    rate = TrainingRate(ITL, 0.02, 64)

    def seconds(count: int, busy: float, start: float) -> float:
        """`busy` of each second with a sweep; 128 rows forward in it."""
        for i in range(count):
            state = replace(quiet, now=start + i, sweeps=(sweep,))
            rate.meet(state, MODEL)
            rate.count(Plan(rides=(Ride(1, 128),)), state)
            rate.meet(replace(quiet, now=start + i + busy), MODEL)
        return rate.speed(MODEL)

    assert rate.speed(MODEL) == pytest.approx(1.0), "an idle device is free"
    half = seconds(100, 0.5, 0.0)
    rate.rest()
    assert rate.speed(MODEL) == pytest.approx(1.0)
    assert seconds(100, 0.9, 1000.0) == pytest.approx(half, rel=0.1), "pauses count as well"
