"""Jobs on a disk that is full for a while: nothing is lost, nobody else waits; the engine is scripted."""

import asyncio
import errno

from scripted_engine import in_world

from coserve.server.data import token_file
from coserve.server.gateway import adapter_folders, job_controller


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
