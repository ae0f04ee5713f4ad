"""Which jobs run and how many may wait: slots and the queue's bounds, against a scripted engine."""

import asyncio
from math import ceil

import httpx
from scripted_engine import in_world


def test_slots_are_handed_out_first_come_first_served(tmp_path):
    async def scenario(world):
        file = await world.upload()
        jobs = []
        for _ in range(5):
            jobs.append((await world.create(file=file))["id"])
            await world.until(lambda: not world.services.controller._validation._running)
        await world.until(lambda: len(world.engine.started()) == 2)
        assert world.engine.started() == jobs[:2]
        waiting = [await world.job(job_id) for job_id in jobs]
        places = [job["progress"]["queue_position"] for job in waiting[2:]]
        assert [job["status"] for job in waiting[2:]] == ["queued"] * 3
        assert places == sorted(places) and places[0] < places[1] < places[2]
        assert "at most 2" in waiting[4]["progress"]["reason"]
        assert [job["progress"]["reason"] for job in waiting[:2]] == ["starting"] * 2
        for job_id in jobs[:2]:
            world.engine.tell(job_id, "started", "Fine-tuning job started", total_steps=1)
        world.engine.finish(jobs[1], 1)
        await world.started(jobs[2])
        assert jobs[3] not in world.engine.started()
        await world.a.post(f"/v1/fine_tuning/jobs/{jobs[3]}/cancel")
        await world.a.post(f"/v1/fine_tuning/jobs/{jobs[0]}/cancel")
        await asyncio.sleep(0.03)
        assert jobs[4] not in world.engine.started(), "the slot is free only when the engine let go"
        world.engine.tell(jobs[0], "cancelled", "cancelled", step=0)
        await world.started(jobs[4])

    in_world(tmp_path, scenario, max_jobs_running=2)


def test_a_wait_is_told_in_tens_of_seconds_and_by_those_jobs_that_know_when_they_end(tmp_path):
    async def scenario(world):
        file = await world.upload()
        knows, new, *waiting = [(await world.create(file=file))["id"] for _ in range(4)]
        for job_id in (knows, new):
            await world.started(job_id)
            world.engine.tell(job_id, "started", "Fine-tuning job started", total_steps=10**6)
            await world.status(job_id, "running")
        world.engine.tell(knows, "step", step=1, total_steps=10**6, tokens=9, train_loss=1.0)

        async def progress(job_id):
            return (await world.job(job_id))["progress"]

        async def pace_is_known():
            return (await progress(knows))["eta_seconds"]

        seconds = await world.until(pace_is_known)
        for job_id in waiting:
            await world.status(job_id, "queued")
        told = [(await progress(job_id))["expected_wait_seconds"] for job_id in waiting]
        assert seconds > 0.0 and told == [10.0 * ceil(seconds / 10.0), None]

    in_world(tmp_path, scenario, max_jobs_running=2)


def test_the_queue_is_bounded_for_each_tenant(tmp_path):
    async def scenario(world):
        await world.engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        file, other = await world.upload(), await world.upload(world.b)
        for _ in range(3):
            await world.create(file=file)
        body = {"model": "base", "training_file": file}
        answer = await world.a.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after-ms"]) > 0
        assert (await world.create(world.b, file=other))["status"] == "validating_files"

    in_world(tmp_path, scenario, max_jobs_queued_tenant=3)


def test_a_burst_of_creates_does_not_pass_the_bound(tmp_path):
    async def scenario(world):
        await world.engine.stop()
        body = {"model": "base", "training_file": await world.upload()}
        answers: list[httpx.Response] = await asyncio.gather(
            *(world.a.post("/v1/fine_tuning/jobs", json=body) for _ in range(10))
        )
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 7

    in_world(tmp_path, scenario, max_jobs_queued_tenant=3)


async def at_step(world, job_id, step):
    async def reached():
        return (await world.job(job_id))["progress"]["step"] == step

    await world.until(reached)


def test_a_tenant_that_holds_all_slots_gives_one_to_another_and_its_job_goes_on_later(tmp_path):
    async def scenario(world):
        first, second = await world.running(), await world.running()
        for job_id in (first, second):
            world.engine.step(job_id, 1)
            await at_step(world, job_id, 1)
        theirs = (await world.create(world.b))["id"]
        await world.until(lambda: world.engine.stops() == [(second, True)])
        assert theirs not in world.engine.started(), "the slot is free when the engine has let go"
        world.engine.tell(second, "paused", "Fine-tuning job paused", step=1)
        await world.started(theirs)
        job = await world.status(second, "queued")
        assert job["progress"]["step"] == 1 and "at most 2" in job["progress"]["reason"]
        told = await world.messages(second)
        assert "another tenant" in told[-1] and "Fine-tuning job paused" not in told
        assert world.engine.started().count(second) == 1, "it does not take the slot back"
        world.engine.tell(theirs, "started", "Fine-tuning job started", total_steps=1)
        world.engine.finish(theirs, 1)
        await world.started(second, 2)
        assert world.engine.stops() == [(second, True)]

    in_world(tmp_path, scenario, max_jobs_running=2, job_slice_seconds=0.0)


def test_a_job_keeps_its_slot_for_a_slice_and_for_a_step(tmp_path):
    async def scenario(world):
        jobs = [await world.running(), await world.running()]
        theirs = (await world.create(world.b))["id"]
        await world.until(lambda: not world.services.controller._validation._running)
        await asyncio.sleep(0.05)
        assert not world.engine.stops(), "neither has done a step"
        world.engine.step(jobs[0], 1)
        await at_step(world, jobs[0], 1)
        await world.create(world.b)  # the queue is looked at
        await world.until(lambda: world.engine.stops() == [(jobs[0], True)])
        await world.a.post(f"/v1/fine_tuning/jobs/{jobs[0]}/cancel")
        world.engine.tell(jobs[0], "cancelled", "cancelled", step=1)
        await world.started(theirs)
        assert (await world.job(jobs[0]))["status"] == "cancelled", "a tenant's word overrules"

    in_world(tmp_path, scenario, max_jobs_running=2, job_slice_seconds=0.0)


def test_a_slice_lasts(tmp_path):
    async def scenario(world):
        jobs = [await world.running(), await world.running()]
        for job_id in jobs:
            world.engine.step(job_id, 1)
            await at_step(world, job_id, 1)
        await world.create(world.b)
        await world.until(lambda: not world.services.controller._validation._running)
        await asyncio.sleep(0.03)
        assert not world.engine.stops()

    in_world(tmp_path, scenario, max_jobs_running=2, job_slice_seconds=60.0)
