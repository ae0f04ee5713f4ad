"""Adapters over HTTP: upload, versions, download, deletion, and two tenants with the same name."""

import asyncio
import io
import json
import tarfile

import pytest
from scripted_engine import in_world

URL = "/v1/adapters"
CONFIG = json.dumps({"peft_type": "LORA", "r": 4}).encode()


def packed(tensors=b"weights", config=CONFIG):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("adapter_config.json", config), ("adapter_model.safetensors", tensors)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def send(client, name="mine", content=None):
    return await client.post(
        URL, files={"file": ("a.tar", packed() if content is None else content)}, data={"name": name}
    )


def folders(world):
    return sorted(path.name for path in (world.services.data.root / "adapters").glob("*/*/*"))


def test_upload_and_versions(tmp_path):
    async def scenario(world):
        one = (await send(world.a, content=packed(b"one"))).json()
        assert one["object"] == "adapter" and one["name"] == "mine" and one["version"] == 1 and one["rank"] == 4
        assert one["bytes"] == len(b"one") + len(CONFIG) and one["pinned"] is False and one["fine_tuned_model"] is None
        two = (await send(world.a, content=packed(b"two"))).json()
        assert two["id"] == one["id"] and two["version"] == 2 and two["digest"] != one["digest"]
        same = (await send(world.a, content=packed(b"two"))).json()
        assert same["version"] == 2
        back = (await send(world.a, content=packed(b"one"))).json()
        assert back["version"] == 3 and back["digest"] == one["digest"]
        versions = (await world.a.get(f"{URL}/mine/versions")).json()["data"]
        assert [v["version"] for v in versions] == [3, 2, 1] and versions[0]["id"] == f"mine@{one['digest'][:12]}"
        for reference in (one["id"], "mine"):
            assert (await world.a.get(f"{URL}/{reference}")).json() == back
        assert (await world.a.post(f"{URL}/mine/pin")).json()["pinned"] is True
        assert (await world.a.post(f"{URL}/{one['id']}/unpin")).json()["pinned"] is False
        assert list((world.services.data.root / "tmp").iterdir()) == []

    in_world(tmp_path, scenario)


def test_a_folder_may_come_as_its_two_files(tmp_path):
    async def scenario(world):
        files = [
            ("file", ("adapter_config.json", CONFIG)), ("file", ("adapter_model.safetensors", b"x")),
        ]  # fmt: skip
        answer = await world.a.post(URL, files=files, data={"name": "two-files"})
        assert answer.status_code == 200 and answer.json()["version"] == 1
        files[1] = ("file", ("adapter_model.bin", b"x"))
        answer = await world.a.post(URL, files=files, data={"name": "two-files"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"

    in_world(tmp_path, scenario)


def test_download_gives_the_same_tar_each_time(tmp_path):
    async def scenario(world):
        adapter = (await send(world.a)).json()
        answers = [await world.a.get(f"{URL}/{ref}/download") for ref in (adapter["id"], "mine", "mine")]
        assert len({answer.content for answer in answers}) == 1
        assert answers[0].headers["content-type"] == "application/x-tar"
        assert int(answers[0].headers["content-length"]) == len(answers[0].content)
        with tarfile.open(fileobj=io.BytesIO(answers[0].content)) as archive:
            assert archive.extractfile("adapter_model.safetensors").read() == b"weights"
        again = (await send(world.a, name="copy", content=answers[0].content)).json()
        assert again["digest"] == adapter["digest"]
        await send(world.a, content=packed(b"newer"))
        old = await world.a.get(f"{URL}/mine@{adapter['digest'][:12]}/download")
        assert old.content == answers[0].content
        job_id = await world.running(suffix="s")
        world.engine.checkpoint(job_id, 1, b"at one")
        world.engine.finish(job_id)
        model = (await world.status(job_id, "succeeded"))["fine_tuned_model"]
        assert b"final" in (await world.a.get(f"{URL}/{model}/download")).content
        assert b"at one" in (await world.a.get(f"{URL}/{model}:ckpt-step-1/download")).content
        assert b"moments" not in (await world.a.get(f"{URL}/{model}:ckpt-step-1/download")).content

    in_world(tmp_path, scenario)


@pytest.mark.security
def test_what_is_refused_leaves_nothing(tmp_path):
    async def scenario(world):
        bad = await send(world.a, content=packed(b"bad tensors"))
        assert bad.status_code == 400
        assert bad.json()["error"]["param"] == "x" and "NaN" in bad.json()["error"]["message"]
        assert (await send(world.a, content=b"not a tar" * 200)).json()["error"]["code"] == "invalid_adapter"
        for name in ("base", "ft:base:a::x", "", "a/b", "..", ".", "x" * 65, "ä", "a b", "adapter-" + "0" * 22):
            answer = await send(world.a, name=name)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "name", name
        answer = await world.a.post(URL, files={"file": ("../a.tar", packed())}, data={"name": "x"})
        assert answer.status_code in (200, 400)
        assert (await world.a.post(URL, data={"name": "x"})).status_code == 400
        assert folders(world) == [] or answer.status_code == 200
        assert list((world.services.data.root / "tmp").iterdir()) == []

    in_world(tmp_path, scenario)


def test_without_an_engine_uploads_say_so(tmp_path):
    async def scenario(world):
        await world.engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        answer = await send(world.a)
        assert answer.status_code == 503 and int(answer.headers["retry-after-ms"]) > 0
        assert folders(world) == []

    in_world(tmp_path, scenario)


def test_the_files_of_a_deleted_adapter_stay_until_the_engine_lets_go(tmp_path):
    async def scenario(world):
        adapter = (await send(world.a, content=packed(b"one"))).json()
        await send(world.a, content=packed(b"two"))
        world.engine.drops_answered = False
        gone = await world.a.delete(f"{URL}/mine")
        assert gone.json() == {"id": adapter["id"], "object": "adapter", "deleted": True}
        assert (await world.a.get(f"{URL}/mine")).status_code == 404
        assert (await world.a.get(f"/v1/models/{adapter['id']}")).status_code == 404
        await asyncio.sleep(0.05)
        assert len(folders(world)) == 2
        world.engine.drops_answered = True
        await world.engine.crash()  # the next process has nothing loaded and answers at once
        fresh = (await send(world.a, content=packed(b"three"))) if world.services.engine.engine else None
        await world.until(
            lambda: len(folders(world)) == (1 if fresh is not None and fresh.status_code == 200 else 0), 20
        )

    in_world(tmp_path, scenario)


def test_two_tenants_with_the_same_name_each_have_their_own(tmp_path):
    async def scenario(world):
        a = (await send(world.a, content=packed(b"of a"))).json()
        b = (await send(world.b, content=packed(b"of b"))).json()
        assert a["id"] != b["id"]
        assert b"of a" in (await world.a.get(f"{URL}/mine/download")).content
        assert b"of b" in (await world.b.get(f"{URL}/mine/download")).content
        assert [x["id"] for x in (await world.b.get(URL)).json()["data"]] == [b["id"]]
        await world.b.delete(f"{URL}/mine")
        assert (await world.a.get(f"{URL}/mine")).json() == a

    in_world(tmp_path, scenario)


def test_equal_adapters_of_two_tenants_are_deleted_apart(tmp_path):
    async def scenario(world):
        for client in (world.a, world.b):
            await send(client)
        await world.a.delete(f"{URL}/mine")
        await world.until(lambda: len(folders(world)) == 1)
        assert (await world.b.get(f"{URL}/mine/download")).status_code == 200

    in_world(tmp_path, scenario)


def test_lists_are_paged(tmp_path):
    async def scenario(world):
        ids = [(await send(world.a, name=f"n{i}", content=packed(b"%d" % i))).json()["id"] for i in range(5)]
        page = (await world.a.get(URL, params={"limit": 2})).json()
        assert [x["id"] for x in page["data"]] == ids[:2:-1] and page["has_more"]
        page = (await world.a.get(URL, params={"limit": 5, "after": page["last_id"]})).json()
        assert [x["id"] for x in page["data"]] == ids[2::-1] and not page["has_more"]

    in_world(tmp_path, scenario)
