"""Jobs through the whole gateway, against an engine that does what the test says, when it says it."""

import asyncio
import errno
import hashlib

import httpx
from scripted_engine import ScriptedEngine, gateway, in_world

from coserve.server.data import token_file
from coserve.server.gateway import adapter_folders, job_controller
from coserve.server.store.datadir import DataDirectory


def test_a_job_runs_from_its_file_to_its_model(tmp_path):
    async def scenario(world):
        job = await world.create(suffix="mine", metadata={"k": "v"})
        assert job["status"] == "validating_files"
        assert job["fine_tuned_model"] is None and job["finished_at"] is None and job["error"] is None
        job_id, engine = job["id"], world.engine
        await world.started(job_id)
        folder = engine.data_dir / "jobs" / job_id
        assert (folder / "spec.json").exists() and (folder / "tokens" / "train.safetensors").exists()
        engine.tell(job_id, "started", "Fine-tuning job started", total_steps=9)
        await world.status(job_id, "running")
        for step in (1, 2, 3):
            engine.step(job_id, step, 9)
        digest = engine.checkpoint(job_id, 3)
        engine.step(job_id, 4, 9, loss=0.75)

        async def step_four():
            return (await world.job(job_id))["progress"]["step"] == 4

        await world.until(step_four)
        job = await world.job(job_id)
        assert job["progress"]["loss"] == 0.75 and job["progress"]["total_steps"] == 9
        assert job["progress"]["tokens_per_second"] > 0 and job["progress"]["eta_seconds"] >= 0
        assert job["estimated_finish"] is not None
        checkpoints = (await world.a.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")).json()
        assert [c["step_number"] for c in checkpoints["data"]] == [3] and checkpoints["has_more"] is False
        name = checkpoints["data"][0]["fine_tuned_model_checkpoint"]
        assert name == f"ft:base:a:mine:{job_id.removeprefix('ftjob-')}:ckpt-step-3"
        model = await world.services.store.models.resolve((await tenant(world)), name)
        assert model is not None and model.digest == digest
        final = engine.finish(job_id, 9)
        job = await world.status(job_id, "succeeded")
        assert job["fine_tuned_model"] == name.removesuffix(":ckpt-step-3")
        assert job["trained_tokens"] == 1234 and job["finished_at"] and job["estimated_finish"] is None
        assert (await world.a.get(f"/v1/models/{job['fine_tuned_model']}")).status_code == 200
        version = await world.services.store.models.resolve(await tenant(world), job["fine_tuned_model"])
        assert version.digest == final
        copied = sorted(path.name for path in (engine.data_dir / version.path).iterdir())
        assert copied == ["adapter_config.json", "adapter_model.safetensors"]
        result = (await world.a.get(f"/v1/files/{job['result_files'][0]}")).json()
        assert result["purpose"] == "fine-tune-results"
        content = await world.a.get(f"/v1/files/{job['result_files'][0]}/content")
        assert content.content == b"step,train_loss\n1,1.5\n"
        messages = await world.messages(job_id)
        assert messages[:4] == [
            f"Created fine-tuning job: {job_id}", f"Validating training file: {job['training_file']}",
            "Files validated, moving job to queued state", "Fine-tuning job started",
        ]  # fmt: skip
        assert messages[4] == "Step 1/9: training loss=1.50"
        assert messages[-2:] == [
            f"New fine-tuned model created: {job['fine_tuned_model']}", "The job has successfully completed"
        ]  # fmt: skip
        assert not (folder / "tokens").exists()

    in_world(tmp_path, scenario)


async def tenant(world):
    return (await world.services.store.tenants.by_name("a")).id


def test_a_faulty_file_fails_the_job_with_its_lines(tmp_path):
    async def scenario(world):
        answer = await world.a.post(
            "/v1/files", files={"file": ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": 3}\nnot json\n')},
            data={"purpose": "fine-tune"},
        )  # fmt: skip
        job = await world.create(file=answer.json()["id"])
        job = await world.status(job["id"], "failed")
        assert job["error"]["code"] == "invalid_training_file" and job["error"]["param"] == "training_file"
        assert "Line 2" in job["error"]["message"] and "Line 3" in job["error"]["message"]
        assert world.engine.started() == []
        events = (await world.a.get(f"/v1/fine_tuning/jobs/{job['id']}/events")).json()["data"]
        assert events[0]["level"] == "error"

    in_world(tmp_path, scenario)


def test_a_validation_file_is_checked_and_handed_over(tmp_path):
    async def scenario(world):
        bad = await world.a.post(
            "/v1/files", files={"file": ("v.jsonl", b"{}\n")}, data={"purpose": "fine-tune"}
        )  # fmt: skip
        job = await world.create(validation_file=bad.json()["id"])
        job = await world.status(job["id"], "failed")
        assert job["error"]["code"] == "invalid_validation_file" and job["error"]["param"] == "validation_file"
        job = await world.create(validation_file=await world.upload(rows=3), training={"eval_every": 2})
        await world.started(job["id"])
        assert (world.engine.data_dir / "jobs" / job["id"] / "tokens" / "valid.safetensors").exists()

    in_world(tmp_path, scenario)


def test_over_length_rows_are_cut_with_a_warning(tmp_path):
    async def scenario(world):
        row = b'{"text": "%s"}\n' % (b"word " * 40)
        file = await world.a.post(
            "/v1/files", files={"file": ("t.jsonl", row * 3 + b'{"text": "short"}\n')}, data={"purpose": "fine-tune"}
        )
        job = await world.create(file=file.json()["id"], training={"max_length": 16})
        await world.started(job["id"])
        events = (await world.a.get(f"/v1/fine_tuning/jobs/{job['id']}/events")).json()["data"]
        warning = next(event for event in events if event["level"] == "warn")
        assert "3 of 4" in warning["message"] and "16 tokens" in warning["message"]

    in_world(tmp_path, scenario)


def test_lost_repeated_and_late_events_are_applied_once_and_in_order(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(), world.engine
        engine.write(job_id, "warning", "first, not pushed")
        second = engine.write(job_id, "warning", "second, pushed")
        engine.push(second)
        engine.push(second)

        async def there():
            return (await world.messages(job_id))[-1] == "second, pushed"

        await world.until(there, 2)
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


def test_one_job_whose_events_cannot_be_stored_does_not_hold_up_the_others(tmp_path, monkeypatch):
    async def scenario(world):
        world.services.controller._tick_seconds = 0.1
        blocked, other = await world.running(), await world.running()
        world.engine.finish(blocked)  # its version cannot be copied for a while
        for step in range(1, 40):
            world.engine.step(other, step, 50)
            await asyncio.sleep(0.01)  # news keep coming: the clock has to tick all the same
        assert (await world.job(other))["progress"]["step"] > 10
        monkeypatch.undo()
        assert await world.status(blocked, "succeeded")

    real = adapter_folders.shutil.copyfile

    def full(source, *args, **options):
        if "step-00000010" in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, *args, **options)

    monkeypatch.setattr(adapter_folders.shutil, "copyfile", full)
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
        await asyncio.sleep(0.02)
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


def test_publishing_makes_versions_and_pruning_takes_checkpoints(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(suffix="s"), world.engine
        engine.checkpoint(job_id, 1, b"one")
        engine.checkpoint(job_id, 2, b"two")
        path = f"jobs/{job_id}/checkpoints/step-00000002"
        digest = hashlib.sha256(b"two").hexdigest()
        engine.tell(job_id, "published", "Version published at step 2", step=2, path=path, digest=digest)
        engine.tell(job_id, "pruned", "Checkpoint of step 1 removed", step=1, path=path)

        async def pruned():
            checkpoints = (await world.a.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")).json()["data"]
            return [c["step_number"] for c in checkpoints] == [2]

        await world.until(pruned)
        model = f"ft:base:a:s:{job_id.removeprefix('ftjob-')}"
        assert (await world.a.get(f"/v1/models/{model}")).status_code == 200
        assert (await world.a.get(f"/v1/models/{model}:ckpt-step-2")).status_code == 200
        assert (await world.a.get(f"/v1/models/{model}:ckpt-step-1")).status_code == 404
        assert (await world.b.get(f"/v1/models/{model}")).status_code == 404
        adapter = (await world.a.get("/v1/adapters")).json()["data"][0]
        busy = await world.a.delete(f"/v1/adapters/{adapter['id']}")
        assert busy.status_code == 409
        engine.finish(job_id)
        await world.status(job_id, "succeeded")
        versions = (await world.a.get(f"/v1/adapters/{adapter['id']}/versions")).json()["data"]
        assert [v["version"] for v in versions] == [2, 1] and versions[1]["step_number"] == 2
        assert (await world.a.delete(f"/v1/adapters/{adapter['id']}")).json()["deleted"] is True

    in_world(tmp_path, scenario)


def test_a_failure_of_the_engine_is_the_jobs_error(tmp_path):
    async def failing(world):
        job_id = await world.running()
        event = world.engine.write(job_id, "failed", "The loss diverged", level="error")
        event.record["data"] = {"code": "loss_diverged", "message": "The loss diverged"}
        world.engine.push(event)
        job = await world.status(job_id, "failed")
        assert job["error"] == {"code": "loss_diverged", "message": "The loss diverged", "param": None}

    in_world(tmp_path, failing)


def test_a_full_disk_delays_a_version_and_loses_nothing(tmp_path, monkeypatch):
    """The copy of the finished adapter fails first; the job succeeds once there is room."""
    real, calls = adapter_folders.shutil.copyfile, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    async def scenario(world):
        world.services.controller._tick_seconds = 0.05
        job_id = await world.running()
        monkeypatch.setattr(adapter_folders.shutil, "copyfile", full)
        world.engine.finish(job_id)
        job = await world.status(job_id, "succeeded")
        assert len(calls) > 2 and job["fine_tuned_model"]
        assert list((world.engine.data_dir / "tmp").iterdir()) == []

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
        await asyncio.sleep(0.02)
        engine.pid += 1  # a process that says nothing of the job
        await engine.start()
        assert (await pausing).json()["status"] == "paused"
        await world.until(lambda: world.services.engine.engine is not None)
        engine.finish(other)
        assert (await world.status(other, "succeeded"))["fine_tuned_model"]

    in_world(tmp_path, scenario)


def test_a_pause_for_lack_of_room_ends_when_there_is_room(tmp_path, monkeypatch):
    free = [10_000]
    real = job_controller.shutil.disk_usage
    monkeypatch.setattr(job_controller.shutil, "disk_usage", lambda path: real(path)._replace(free=free[0]))

    async def scenario(world):
        world.services.controller._tick_seconds = 0.02
        full, silent = await world.running(), await world.running()
        world.engine.tell(full, "paused", "No room", step=3, reason="storage_full")
        assert (await world.status(full, "paused"))["progress"]["reason"] == "storage_full"
        await asyncio.sleep(0.1)
        assert world.engine.started().count(full) == 1
        free[0] = 50_000_000
        await world.started(full, 2)
        await world.started(silent, 2)  # the disk was too full to say that it paused, too
        assert (await world.job(silent))["status"] == "running"
        asked = await world.running()
        pausing = asyncio.create_task(world.a.post(f"/v1/fine_tuning/jobs/{asked}/pause"))
        await world.until(lambda: (asked, True) in world.engine.stops())
        world.engine.tell(asked, "paused", "Fine-tuning job paused", step=0)
        await pausing
        free[0] = 500_000_000
        await asyncio.sleep(0.1)
        assert (await world.job(asked))["status"] == "paused", "a pause that was asked for stays"

    in_world(tmp_path, scenario)


def test_no_room_for_the_tokens_fails_the_job_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario(world):
        file = await world.upload()
        monkeypatch.setattr(token_file.shutil, "copyfileobj", full)
        job = await world.status((await world.create(file=file))["id"], "failed")
        assert job["error"]["code"] == "storage_full"
        assert not list((world.engine.data_dir / "jobs" / job["id"]).rglob("*.safetensors"))
        assert list((world.engine.data_dir / "tmp").iterdir()) == []

    in_world(tmp_path, scenario)
