"""What becomes of jobs when the gateway or the engine goes away, or news of them are lost; the engine is scripted."""

import asyncio

from scripted_engine import ScriptedEngine, gateway, in_world

from coserve.server.store.datadir import DataDirectory


def test_lost_repeated_and_late_events_are_applied_once_and_in_order(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(), world.engine
        engine.write(job_id, "warning", "first, not pushed")
        second = engine.write(job_id, "warning", "second, pushed")
        engine.push(second)
        engine.push(second)

        async def there():
            return (await world.messages(job_id))[-1] == "second, pushed"

        await world.until(there)
        engine.push(second)
        engine.tell(job_id, "warning", "third")

        async def third():
            return "third" in await world.messages(job_id)

        await world.until(third)
        assert (await world.messages(job_id))[-3:] == ["first, not pushed", "second, pushed", "third"]

    in_world(tmp_path, scenario)


def test_a_new_gateway_catches_up_with_what_the_engine_did(tmp_path):
    async def run():
        data = DataDirectory(tmp_path / "data")
        data.prepare()
        engine = ScriptedEngine(data.root)
        await engine.start()
        try:
            async with gateway(tmp_path, engine) as world:
                await world.until(lambda: world.services.engine.engine is not None)
                job_id = await world.running()
                engine.running_jobs = (job_id,)
                key = world.a.headers["authorization"]
            engine.write(
                job_id, "step", "Step 1/10: training loss=1.00", step=1, total_steps=10, train_loss=1.0, tokens=9
            )
            path = f"jobs/{job_id}/checkpoints/step-00000001"
            digest = engine.folder(path)
            engine.write(job_id, "published", "Version published", step=1, path=path, digest=digest)
            before = len(engine.started())
            async with gateway(tmp_path, engine) as world:
                world.a.headers["authorization"] = key

                async def caught_up():
                    adapters = (await world.a.get("/v1/adapters")).json()["data"]
                    return [adapter["digest"] for adapter in adapters] == [digest]

                await world.until(caught_up)
                assert (await world.job(job_id))["progress"]["step"] == 1
                await asyncio.sleep(0.05)
                assert len(engine.started()) == before, "the engine has the job already"
        finally:
            await engine.close()

    asyncio.run(run())


def test_a_gateway_that_dies_while_validating_begins_again(tmp_path):
    async def run():
        data = DataDirectory(tmp_path / "data")
        data.prepare()
        engine = ScriptedEngine(data.root)  # does not listen yet: validation waits for it
        try:
            async with gateway(tmp_path, engine) as world:
                job_id = (await world.create())["id"]
                key = world.a.headers["authorization"]
                assert (await world.job(job_id))["status"] == "validating_files"
            await engine.start()
            async with gateway(tmp_path, engine) as world:
                world.a.headers["authorization"] = key
                await world.started(job_id)
        finally:
            await engine.close()

    asyncio.run(run())


def test_an_engine_crash_starts_running_jobs_again(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        world.engine.step(job_id, 1)
        await world.engine.crash()
        await world.started(job_id, 2)
        assert (await world.job(job_id))["status"] == "running"
        assert any("restarted" in message for message in await world.messages(job_id))

    in_world(tmp_path, scenario)


def test_three_crashes_without_progress_fail_the_job(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        for times in (2, 3):
            await world.engine.crash()
            await world.started(job_id, times)
        await world.engine.crash()
        job = await world.status(job_id, "failed")
        assert job["error"]["code"] == "engine_crashed"
        await asyncio.sleep(0.05)
        assert world.engine.started().count(job_id) == 3

    in_world(tmp_path, scenario)


def test_progress_forgives_crashes(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        for step in range(1, 6):
            world.engine.tell(job_id, "started", "resumed", total_steps=10, step=step - 1)
            world.engine.step(job_id, step)

            async def arrived(step=step):
                return (await world.job(job_id))["progress"]["step"] == step

            await world.until(arrived)
            await world.engine.crash()
            await world.started(job_id, step + 1)
        assert (await world.job(job_id))["status"] == "running"

    in_world(tmp_path, scenario)


def test_the_steps_done_again_after_a_crash_are_no_progress(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        world.engine.step(job_id, 1)
        for times in (2, 3):
            await world.engine.crash()
            await world.started(job_id, times)
            world.engine.tell(job_id, "started", "resumed", total_steps=10)
            world.engine.step(job_id, 1)
        await world.engine.crash()
        assert (await world.status(job_id, "failed"))["error"]["code"] == "engine_crashed"

    in_world(tmp_path, scenario)


def test_a_job_that_crashes_the_engine_does_not_take_others_with_it(tmp_path):
    async def scenario(world):
        engine = world.engine
        good, bad = await world.running(), await world.running()
        await engine.crash()
        for times in range(2, 9):
            # Whatever the order: the good one makes a step whenever it runs, the bad one kills the engine.
            await world.until(lambda times=times: len(engine.started()) >= times + 1)
            latest = engine.started()[-1]
            if latest == good:
                done = engine.started().count(good)
                engine.tell(good, "started", "resumed", total_steps=10, step=done - 1)
                engine.step(good, done)
            else:
                await engine.crash()
            if (await world.job(bad))["status"] == "failed":
                break
            await asyncio.sleep(0.05)
        assert (await world.status(bad, "failed"))["error"]["code"] == "engine_crashed"
        assert (await world.job(good))["status"] == "running"

    in_world(tmp_path, scenario)
