"""Files over HTTP: whole or not there, paged, and nobody else's."""

import asyncio
import errno

import pytest
from scripted_engine import ScriptedEngine, gateway, in_world

from coserve.server.api import multipart
from coserve.server.store.datadir import DataDirectory

HEAD = b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'


def stored(world):
    """Everything that lies under files/ and tmp/."""
    root = world.services.data.root
    return sorted(
        str(path.relative_to(root)) for top in ("files", "tmp") for path in (root / top).rglob("*") if path.is_file()
    )


async def send(world, content=b'{"text": "x"}\n', name="train.jsonl", purpose="fine-tune"):
    return await world.a.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})


def test_upload_read_and_delete(tmp_path):
    async def scenario(world):
        content = bytes(range(256)) * 9000
        answer = await send(world, content, name="my data ü.jsonl")
        file = answer.json()
        assert answer.status_code == 200
        assert {k: v for k, v in file.items() if k not in ("id", "created_at")} == {
            "object": "file", "bytes": len(content), "filename": "my data ü.jsonl", "purpose": "fine-tune",
            "status": "processed", "expires_at": None, "status_details": None,
        }  # fmt: skip
        assert (await world.a.get(f"/v1/files/{file['id']}")).json() == file
        body = await world.a.get(f"/v1/files/{file['id']}/content")
        assert body.content == content and body.headers["content-type"] == "application/octet-stream"
        assert body.headers["x-content-type-options"] == "nosniff"
        for method in ("GET", "DELETE"):
            assert (await world.b.request(method, f"/v1/files/{file['id']}")).status_code == 404
        gone = await world.a.delete(f"/v1/files/{file['id']}")
        assert gone.json() == {"id": file["id"], "object": "file", "deleted": True}
        assert (await world.a.get(f"/v1/files/{file['id']}/content")).status_code == 404
        assert (await world.a.delete(f"/v1/files/{file['id']}")).status_code == 404
        assert stored(world) == []

    in_world(tmp_path, scenario)


def test_lists_are_paged_to_their_end(tmp_path):
    async def scenario(world):
        ids = [(await send(world, purpose="batch" if i % 2 else "fine-tune")).json()["id"] for i in range(7)]
        seen, after = [], None
        for _ in range(9):
            page = (await world.a.get("/v1/files", params={"limit": 3, **({"after": after} if after else {})})).json()
            seen += [file["id"] for file in page["data"]]
            assert page["object"] == "list"
            assert page["first_id"] == page["data"][0]["id"] and page["last_id"] == page["data"][-1]["id"]
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert seen == ids[::-1]
        oldest = (await world.a.get("/v1/files", params={"order": "asc", "purpose": "batch"})).json()
        assert [file["id"] for file in oldest["data"]] == ids[1::2] and oldest["has_more"] is False
        assert (await world.b.get("/v1/files")).json()["data"] == []
        foreign = await world.b.get("/v1/files", params={"after": ids[0]})
        unknown = await world.b.get("/v1/files", params={"after": "file-nothing"})
        assert foreign.status_code == 400 and foreign.content == unknown.content
        for params in ({"limit": 0}, {"limit": "x"}, {"limit": 10**9}, {"order": "up"}):
            assert (await world.a.get("/v1/files", params=params)).status_code == 400

    in_world(tmp_path, scenario)


@pytest.mark.security
def test_names_that_are_no_names_are_refused(tmp_path):
    async def scenario(world):
        names = [
            "../x", "..", ".", "a/b", "/etc/passwd", "..\\x", "a\\b", "%2e%2e%2fx", "x%2Ejsonl", "a%2Fb", "a%5cb",
            "%00", "x%252e", "a\nb", "a\x7fb", "\u202etxt", "x" * 300,
        ]  # fmt: skip
        for name in names:
            # httpx would encode some of these: write the part by hand.
            quoted = name.encode("utf-8").replace(b"\\", b"\\\\")
            body = (
                b'--B\r\ncontent-disposition: form-data; name="file"; filename="' + quoted + b'"\r\n\r\n{}\r\n--B--\r\n'
            )
            answer = await world.a.post(
                "/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=B"}
            )
            assert answer.status_code == 400, name
            assert "error" in answer.json()
        assert stored(world) == []

    in_world(tmp_path, scenario)


def test_what_cannot_be_stored_leaves_nothing(tmp_path):
    async def scenario(world):
        too_large = await send(world, b"x" * 4097)
        assert too_large.status_code == 413 and too_large.json()["error"]["param"] == "file"
        assert (await send(world, b"x" * 4096)).status_code == 200
        kept = stored(world)
        assert (await send(world, b"")).json()["error"]["code"] == "empty_file"
        assert (await send(world, purpose="nonsense")).json()["error"]["param"] == "purpose"
        assert (await send(world, purpose="fine-tune-results")).status_code == 400
        missing = await world.a.post("/v1/files", files={"file": ("x", b"x")})
        assert missing.json()["error"]["param"] == "purpose"
        missing = await world.a.post("/v1/files", files={"other": ("x", b"x")}, data={"purpose": "fine-tune"})
        assert missing.json()["error"]["param"] == "file"
        two = [("file", ("x", b"x")), ("file", ("y", b"y"))]
        assert (await world.a.post("/v1/files", files=two, data={"purpose": "fine-tune"})).status_code == 400
        expiring = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        answer = await world.a.post("/v1/files", files={"file": ("x", b"x")}, data=expiring)
        assert answer.json()["error"]["code"] == "unsupported_value"
        assert stored(world) == kept

    in_world(tmp_path, scenario, max_upload=4096)


@pytest.mark.security
def test_malformed_bodies(tmp_path):
    async def scenario(world):
        multipart = "multipart/form-data; boundary=B"
        for content_type, body in [
            ("application/json", b"{}"), ("multipart/form-data", HEAD), ("multipart/form-data; boundary=", HEAD),
            (multipart, b""), (multipart, b"junk"), (multipart, HEAD + b"cut off"), (multipart, HEAD + b"x\r\n--B\r\n"),
            (multipart, b'--B\r\ncontent-disposition: form-data; filename="x"\r\n\r\nx\r\n--B--\r\n'),
            (multipart, b"--B\r\n\r\nx\r\n--B--\r\n"), (multipart, b"--B\r\n" + b"x: y\r\n" * 5000),
            (multipart, b"--B\r\nx: " + b"y" * 100_000),
            (multipart, HEAD.replace(b'"x"', b'"\xff\xfe"') + b"x\r\n--B--\r\n"),
            (multipart, b'--B\r\ncontent-disposition: form-data; name="p"\r\n\r\n' + b"x" * 70_000 + b"\r\n--B--\r\n"),
            (multipart, b'--B\r\ncontent-disposition: form-data; name="x"\r\n\r\n\r\n' * 99),
        ]:  # fmt: skip
            answer = await world.a.post("/v1/files", content=body, headers={"content-type": content_type})
            assert answer.status_code == 400, (content_type, body[:80], answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert stored(world) == []

    in_world(tmp_path, scenario)


def test_an_upload_that_is_cut_off_or_abandoned_leaves_nothing(tmp_path):
    async def scenario(world):
        sent = asyncio.Event()

        async def body():
            yield b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
            for _ in range(40):
                yield b"x" * 65536
            sent.set()
            await asyncio.sleep(60)

        headers = {"content-type": "multipart/form-data; boundary=B"}
        task = asyncio.create_task(world.a.post("/v1/files", content=body(), headers=headers))
        await sent.wait()
        await world.until(lambda: stored(world))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert stored(world) == []

        messages = [
            {"type": "http.request", "body": b"x" * 65536, "more_body": True},
            {"type": "http.request", "body": HEAD + b"x" * 2**21, "more_body": True},
            {"type": "http.disconnect"},
        ]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/files", "raw_path": b"/v1/files", "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("x", 1), "root_path": "",
            "headers": [
                (b"authorization", world.a.headers["authorization"].encode()),
                (b"content-type", b"multipart/form-data; boundary=B"),
            ],
        }  # fmt: skip
        for start in (0, 1):
            left = iter(messages[start:])
            answers: list[dict] = []

            async def receive(left=left):
                return next(left)

            async def send(message, answers=answers):
                answers.append(message)

            await world.a._transport.app(scope, receive, send)
            assert answers[0]["status"] == 400
            assert stored(world) == []
        assert (await world.a.get("/v1/files")).json()["data"] == []

    in_world(tmp_path, scenario)


def test_uploads_beside_each_other_do_not_mix(tmp_path):
    async def scenario(world):
        contents = [bytes([i]) * (300_000 + i) for i in range(8)]
        answers = await asyncio.gather(*(send(world, content) for content in contents))
        for content, answer in zip(contents, answers, strict=True):
            got = await world.a.get(f"/v1/files/{answer.json()['id']}/content")
            assert got.content == content

    in_world(tmp_path, scenario)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    async def scenario(world):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(multipart.os, "write", full)
            answer = await send(world)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage_full"
        assert int(answer.headers["retry-after-ms"]) > 0
        assert stored(world) == []
        assert (await send(world)).status_code == 200

    in_world(tmp_path, scenario)


def test_a_new_gateway_removes_what_the_last_one_left_half_done(tmp_path):
    async def run():
        data = DataDirectory(tmp_path / "data")
        data.prepare()
        engine = ScriptedEngine(data.root)
        try:
            async with gateway(tmp_path, engine) as world:
                kept = (await send(world)).json()["id"]
                tenant = (await world.services.store.tenants.by_name("a")).id
            left = [data.tmp / "upload-x" / "part-0", data.root / "files" / tenant / "file-unknown"]
            left.append(data.root / "adapters" / tenant / "adapter-x" / ("0" * 64) / "adapter_config.json")
            for path in left:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x")
            async with gateway(tmp_path, engine) as world:
                assert stored(world) == [f"files/{tenant}/{kept}"]
                assert not any(path.exists() for path in left)
        finally:
            await engine.close()

    asyncio.run(run())
