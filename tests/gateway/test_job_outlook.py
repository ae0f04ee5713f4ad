"""What the engine expects of a job, as the job's object shows it, against a scripted engine."""

import time

from scripted_engine import in_world

from coserve.server.wire.messages import JobReport, Stats


def test_a_running_job_shows_what_the_engine_expects_before_its_first_step_and_until_it_ends(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        assert (await world.job(job_id))["estimated_finish"] is None

        async def foretold():
            return (await world.job(job_id))["progress"]["expected_tokens_per_second"]

        world.engine.push(Stats(time.monotonic() - 10.0, {}, {}, jobs=(JobReport(job_id, 123.456, 100.0),)))
        assert await world.until(foretold) == 123.46
        job = await world.job(job_id)
        assert 85.0 < job["progress"]["eta_seconds"] <= 90.0, "the report is ten seconds old"
        assert abs(job["estimated_finish"] - time.time() - 90.0) < 5.0
        assert job["progress"]["step"] == 0 and job["progress"]["tokens_per_second"] is None
        listed = (await world.a.get("/v1/fine_tuning/jobs")).json()["data"][0]
        assert abs(listed["estimated_finish"] - job["estimated_finish"]) <= 2

        world.engine.finish(job_id)
        job = await world.status(job_id, "succeeded")
        assert job["estimated_finish"] is None and job["progress"]["expected_tokens_per_second"] is None

    in_world(tmp_path, scenario)


def test_a_job_that_waits_in_the_engine_says_for_what(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        world.engine.push(Stats(time.monotonic(), {}, {}, jobs=(JobReport(job_id, waits="waiting for room"),)))

        async def reason():
            return (await world.job(job_id))["progress"]["reason"]

        assert await world.until(reason) == "waiting for room"
        assert (await world.job(job_id))["estimated_finish"] is None
        world.engine.push(Stats(time.monotonic(), {}, {}, jobs=(JobReport(job_id, 10.0, 20.0),)))

        async def begun():
            return await reason() is None

        await world.until(begun)

    in_world(tmp_path, scenario)


def test_a_queued_job_waits_for_what_the_engine_expects_of_those_that_run(tmp_path):
    async def scenario(world):
        running = await world.running()
        waiting = (await world.create())["id"]
        await world.status(waiting, "queued")
        world.engine.push(Stats(time.monotonic(), {}, {}, jobs=(JobReport(running, 10.0, 95.0),)))

        async def wait():
            return (await world.job(waiting))["progress"]["expected_wait_seconds"]

        assert await world.until(wait) == 100.0

    in_world(tmp_path, scenario, max_jobs_running=1)
