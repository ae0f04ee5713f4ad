"""Jobs on a disk that is full for a while: nothing is lost, nobody else waits; the engine is scripted."""

import asyncio
import errno

from scripted_engine import in_world

from coserve.server.data import token_file
from coserve.server.gateway import adapter_folders, job_controller
from coserve.server.gateway.job_room import LONGEST_WAIT, MARGIN_BYTES, RoomWait, room_wanted


def test_one_job_whose_events_cannot_be_stored_does_not_hold_up_the_others(tmp_path, monkeypatch):
    async def scenario(world):
        world.services.controller._tick_seconds = 0.1
        blocked, other = await world.running(), await world.running()
        world.engine.finish(blocked)  # its version cannot be copied for a while
        for step in range(1, 40):
            world.engine.step(other, step, 50)
            await asyncio.sleep(0.01)  # news keep coming: the clock has to tick all the same

        async def goes_on():
            return (await world.job(other))["progress"]["step"] > 10

        await world.until(goes_on)
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
        world.engine.tell(full, "paused", "No room", step=3, reason="storage_full", needs_bytes=50_000_000)
        assert (await world.status(full, "paused"))["progress"]["reason"] == "storage_full"
        free[0] = 150_000_000  # some, but it would soon be full again: 2 x 50 MB and a margin are wanted
        await asyncio.sleep(0.1)
        assert world.engine.started().count(full) == 1
        free[0] = 200_000_000
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


def test_a_job_that_finds_no_room_again_and_again_waits_longer_each_time(tmp_path):
    """A quota, for instance: the disk says that there is room, and there is none."""

    class Watched(RoomWait):
        """What it was told and asked of the one job, by the gateway's own clock."""

        def __init__(self):
            super().__init__(first_wait=0.2)
            self.pauses, self.refused, self.went = [], [], []

        def paused(self, job_id, now):
            self.pauses.append(now)
            self.refused.append(0)
            super().paused(job_id, now)

        def may_go_on(self, job_id, needed, free, now):
            may = super().may_go_on(job_id, needed, free, now)
            if may:
                self.went.append(now)
            self.refused[-1] += not may
            return may

    async def scenario(world):
        world.services.controller._tick_seconds = 0.02
        world.services.controller._room = room = Watched()
        job_id = await world.running()
        for tries in range(2, 5):
            world.engine.tell(job_id, "paused", "No room", step=1, reason="storage_full")
            await world.started(job_id, tries)
            world.engine.tell(job_id, "started", "resumed", total_steps=10, step=1)
            await world.status(job_id, "running")
        world.engine.checkpoint(job_id, 2)  # there is room: the next pause is a first one
        world.engine.tell(job_id, "paused", "No room", step=3, reason="storage_full")
        await world.started(job_id, 5)
        assert len(room.went) == len(room.pauses) == 4
        waited = [went - paused for paused, went in zip(room.pauses, room.went, strict=True)]
        assert room.refused[0] == room.refused[3] == 0, "the first time there is nothing to wait for"
        assert waited[1] >= 0.2 and waited[2] >= 0.4
        messages = await world.messages(job_id)
        assert messages.count("There is room on the disk again; the job goes on") == 4

    in_world(tmp_path, scenario)


def test_the_marks_of_a_full_disk_lie_apart():
    wait = RoomWait()
    assert not wait.may_go_on("j", 10 * MARGIN_BYTES, room_wanted(10 * MARGIN_BYTES) - 1, 0.0)
    assert wait.may_go_on("j", 10 * MARGIN_BYTES, room_wanted(10 * MARGIN_BYTES), 0.0), "also after a restart"
    assert room_wanted(0) == MARGIN_BYTES
    now, waits = 0.0, []
    for _ in range(12):
        wait.paused("j", now)
        went = now
        while not wait.may_go_on("j", 0, MARGIN_BYTES, went):
            went += 1.0
        waits.append(went - now)
        now = went
    assert waits[:4] == [0.0, 10.0, 20.0, 40.0] and waits[-1] == LONGEST_WAIT


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
