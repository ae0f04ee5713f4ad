"""Cancel, pause and resume at every moment of a job's life, against an engine that does what the test says."""

import asyncio

from scripted_engine import in_world


async def asked_to_pause(world, job_id):
    """Wait until the gateway has entered a pause that the engine has not carried out."""

    async def entered():
        return (await world.job(job_id))["progress"]["reason"] == "pausing"

    await world.until(entered)


def test_cancel_in_every_phase_is_idempotent(tmp_path):
    async def scenario(world):
        engine, url = world.engine, "/v1/fine_tuning/jobs"
        running = await world.running()
        answer = await world.a.post(f"{url}/{running}/cancel")
        assert answer.json()["status"] == "cancelled" and answer.json()["finished_at"]
        await world.until(lambda: (running, False) in engine.stops())
        assert (await world.a.post(f"{url}/{running}/cancel")).json()["status"] == "cancelled"
        engine.tell(running, "cancelled", "Fine-tuning job cancelled", step=1)
        await world.until(lambda: not (engine.data_dir / "jobs" / running / "tokens").exists())
        queued = (await world.create())["id"]
        assert (await world.a.post(f"{url}/{queued}/cancel")).json()["status"] == "cancelled"
        paused = await world.running()
        pausing = asyncio.create_task(world.a.post(f"{url}/{paused}/pause"))
        await world.until(lambda: (paused, True) in engine.stops())
        engine.tell(paused, "paused", "Fine-tuning job paused", step=0)
        assert (await pausing).json()["status"] == "paused"
        assert (await world.a.post(f"{url}/{paused}/cancel")).json()["status"] == "cancelled"
        assert (await world.messages(running)).count("Fine-tuning job cancelled") == 1
        done = await world.running()
        engine.finish(done)
        await world.status(done, "succeeded")
        answer = await world.a.post(f"{url}/{done}/cancel")
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "invalid_state_transition"

    in_world(tmp_path, scenario)


def test_what_comes_of_a_cancelled_job_changes_nothing(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        await world.a.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        before = await world.messages(job_id)
        world.engine.step(job_id, 1)
        world.engine.finish(job_id)
        other = await world.running()
        assert other and (await world.job(job_id))["status"] == "cancelled"
        assert await world.messages(job_id) == before
        assert (await world.a.get("/v1/adapters")).json()["data"] == []

    in_world(tmp_path, scenario)


def test_pause_and_resume(tmp_path):
    async def scenario(world):
        url, engine = "/v1/fine_tuning/jobs", world.engine
        job_id = await world.running()
        assert (await world.a.post(f"{url}/{job_id}/resume")).status_code == 409
        pausing = asyncio.create_task(world.a.post(f"{url}/{job_id}/pause"))
        await world.until(lambda: (job_id, True) in engine.stops())
        assert (await world.job(job_id))["progress"]["reason"] == "pausing"
        engine.checkpoint(job_id, 2)
        engine.tell(job_id, "paused", "Fine-tuning job paused", step=2)
        assert (await pausing).json()["status"] == "paused"
        assert (await world.a.post(f"{url}/{job_id}/pause")).json()["status"] == "paused"
        await asyncio.sleep(0.02)
        assert engine.started().count(job_id) == 1
        assert (await world.a.post(f"{url}/{job_id}/resume")).json()["status"] == "queued"
        await world.started(job_id, 2)
        engine.tell(job_id, "started", "Fine-tuning job resumed at step 2", total_steps=10, step=2)
        assert (await world.status(job_id, "running"))["progress"]["step"] == 2

    in_world(tmp_path, scenario)


def test_pause_before_validation_is_done(tmp_path):
    async def scenario(world):
        url, engine = "/v1/fine_tuning/jobs", world.engine
        job_id = (await world.create())["id"]
        assert (await world.a.post(f"{url}/{job_id}/pause")).status_code == 200
        await world.status(job_id, "paused")
        assert (await world.a.post(f"{url}/{job_id}/resume")).json()["status"] == "queued"
        await world.started(job_id)
        await engine.crash()
        other = (await world.create(file=await world.upload(rows=2000)))["id"]
        assert (await world.a.post(f"{url}/{other}/pause")).json()["status"] == "validating_files"
        assert (await world.a.post(f"{url}/{other}/resume")).json()["status"] == "validating_files"
        await world.started(other)

    in_world(tmp_path, scenario)


def test_a_cancelled_validation_leaves_nothing(tmp_path):
    async def scenario(world):
        job_id = (await world.create(file=await world.upload(rows=5000)))["id"]
        assert (await world.a.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")).json()["status"] == "cancelled"
        await world.until(lambda: job_id not in world.services.controller._validation)
        assert not (world.engine.data_dir / "jobs" / job_id / "tokens").exists()
        assert world.engine.started() == []

    in_world(tmp_path, scenario)


def test_resume_before_the_pause_is_done_wins(tmp_path):
    async def scenario(world):
        url, engine = "/v1/fine_tuning/jobs", world.engine
        job_id = await world.running()
        pausing = asyncio.create_task(world.a.post(f"{url}/{job_id}/pause"))
        await world.until(lambda: (job_id, True) in engine.stops())
        assert (await world.a.post(f"{url}/{job_id}/resume")).json()["status"] == "running"
        assert (await pausing).json()["status"] == "running"
        engine.tell(job_id, "paused", "Fine-tuning job paused", step=0)
        await world.started(job_id, 2)
        assert (await world.job(job_id))["status"] == "running"

    in_world(tmp_path, scenario)


def test_a_pause_asked_for_while_the_engine_is_away_holds(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(), world.engine
        await engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        pausing = asyncio.create_task(world.a.post(f"/v1/fine_tuning/jobs/{job_id}/pause"))
        await asked_to_pause(world, job_id)
        await engine.crash()
        assert (await pausing).json()["status"] == "paused"
        await asyncio.sleep(0.05)
        assert engine.started().count(job_id) == 1

    in_world(tmp_path, scenario)


def test_a_cancel_while_the_engine_is_away_reaches_it(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(), world.engine
        await engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        assert (await world.a.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")).json()["status"] == "cancelled"
        engine.running_jobs = (job_id,)  # the same process, connected again
        await engine.start()
        await world.until(lambda: (job_id, False) in engine.stops())

    in_world(tmp_path, scenario)


def test_a_job_that_finished_before_its_pause_reached_it_has_succeeded(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(), world.engine
        pausing = asyncio.create_task(world.a.post(f"/v1/fine_tuning/jobs/{job_id}/pause"))
        await world.until(lambda: (job_id, True) in engine.stops())
        engine.finish(job_id)
        assert (await pausing).json()["status"] == "succeeded"
        # The same where the gateway believed it paused already.
        other = await world.running()
        await engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        pausing = asyncio.create_task(world.a.post(f"/v1/fine_tuning/jobs/{other}/pause"))
        await asked_to_pause(world, other)
        engine.pid += 1  # a process that says nothing of the job
        await engine.start()
        assert (await pausing).json()["status"] == "paused"
        await world.until(lambda: world.services.engine.engine is not None)
        engine.finish(other)
        assert (await world.status(other, "succeeded"))["fine_tuned_model"]

    in_world(tmp_path, scenario)
