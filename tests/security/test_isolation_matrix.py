"""For every route with an id: another tenant's id answers exactly like one that does not exist.

The rows are checked against the route table, so a new route without a row fails here.
"""

import io
import json
import tarfile

import pytest
from scripted_engine import in_world

from coserve.server.api.auth import Access, route_table
from coserve.server.app import ROUTERS

pytestmark = pytest.mark.security

# (method, path) -> the kind of thing that the id names
MATRIX = {
    ("GET", "/v1/files/{file_id}"): "file",
    ("DELETE", "/v1/files/{file_id}"): "file",
    ("GET", "/v1/files/{file_id}/content"): "file",
    ("GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}"): "job",
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel"): "job",
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause"): "job",
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume"): "job",
    ("GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events"): "job",
    ("GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints"): "job",
    ("GET", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint:path}/permissions"): "model",
    ("POST", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint:path}/permissions"): "model",
    ("DELETE", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint:path}/permissions/{permission_id}"): "model",
    ("GET", "/v1/adapters/{adapter_id:path}"): "adapter",
    ("DELETE", "/v1/adapters/{adapter_id:path}"): "adapter",
    ("GET", "/v1/adapters/{adapter_id:path}/versions"): "adapter",
    ("GET", "/v1/adapters/{adapter_id:path}/download"): "model",
    ("POST", "/v1/adapters/{adapter_id:path}/pin"): "adapter",
    ("POST", "/v1/adapters/{adapter_id:path}/unpin"): "adapter",
    ("GET", "/v1/models/{model:path}"): "model",
    ("DELETE", "/v1/models/{model:path}"): "model",
}

# Bodies and queries that name things: (method, path, body or query, place of the id, kind)
JOB = {"model": "base", "training_file": "FILE"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
NAMED = [
    ("POST", "/v1/fine_tuning/jobs", lambda id_, own: {**JOB, "training_file": id_}, "file"),
    ("POST", "/v1/fine_tuning/jobs", lambda id_, own: {**JOB, "training_file": own, "validation_file": id_}, "file"),
    ("POST", "/v1/fine_tuning/jobs", lambda id_, own: {**JOB, "training_file": own, "model": id_}, "model"),
    ("POST", "/v1/fine_tuning/jobs",
     lambda id_, own: {**JOB, "training_file": own, "adapter": {"init": f"adapter:{id_}"}}, "model"),
    ("POST", "/v1/chat/completions", lambda id_, own: {**CHAT, "model": id_}, "model"),
    ("POST", "/v1/unload_lora_adapter", lambda id_, own: {"lora_name": id_}, "adapter"),
    ("POST", "/tokenize", lambda id_, own: {"model": id_, "prompt": "hi"}, "model"),
    ("POST", "/v1/completions", lambda id_, own: {"model": id_, "prompt": "hi"}, "model"),
]  # fmt: skip
AFTER = [("/v1/files", "file"), ("/v1/fine_tuning/jobs", "job"), ("/v1/adapters", "adapter")]


def with_id(path, id_):
    start, rest = path.split("{", 1)
    return start + id_ + rest.split("}", 1)[1]


def test_every_route_with_an_id_has_a_row():
    routes = {
        (entry.method, entry.path)
        for entry in route_table(ROUTERS)
        if "{" in entry.path and entry.access is not Access.ADMIN and entry.method != "HEAD"
    }
    assert routes == set(MATRIX)


async def things_of_a(world):
    """One of everything, every name that it goes by, all owned by tenant a."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("adapter_config.json", b'{"r": 4}'), ("adapter_model.safetensors", b"weights")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    answer = await world.a.post(
        "/v1/adapters", files={"file": ("a.tar", buffer.getvalue())}, data={"name": "mine"}
    )  # fmt: skip
    adapter = answer.json()
    job_id = await world.running(suffix="s")
    world.engine.checkpoint(job_id, 1)
    world.engine.finish(job_id)
    model = (await world.status(job_id, "succeeded"))["fine_tuned_model"]
    trained = next(a for a in (await world.a.get("/v1/adapters")).json()["data"] if a["fine_tuned_model"] == model)
    adapters = [adapter["id"], "mine", trained["id"], trained["name"], model]
    return {
        "file": [await world.upload()],
        "job": [job_id, await world.running()],
        "adapter": adapters,
        "model": [*adapters, f"{model}:ckpt-step-1", f"mine@{adapter['digest'][:12]}"],
    }


UNKNOWN = {"file": "file-" + "0" * 22, "job": "ftjob-" + "0" * 22, "adapter": "nobodys", "model": "nobodys"}


def same(foreign, unknown, id_, no_id):
    """Equal to the byte, but for the id where a message repeats what was asked for, and the length of that."""
    ignored = {"x-request-id", "content-length"}
    assert foreign.status_code == unknown.status_code
    assert foreign.content.replace(json.dumps(id_)[1:-1].encode(), b"?") == unknown.content.replace(
        no_id.encode(), b"?"
    )
    headers = [{k: v for k, v in answer.headers.items() if k not in ignored} for answer in (foreign, unknown)]
    assert headers[0] == headers[1]


def test_a_foreign_id_answers_like_an_unknown_one(tmp_path):
    async def scenario(world):
        things = await things_of_a(world)
        own = await world.upload(world.b)
        before = await snapshot(world, things)
        for (method, path), kind in MATRIX.items():
            for id_ in things[kind]:
                foreign = await world.b.request(method, with_id(path, id_))
                unknown = await world.b.request(method, with_id(path, UNKNOWN[kind]))
                assert foreign.status_code == 404, (method, path, id_, foreign.text)
                same(foreign, unknown, id_, UNKNOWN[kind])
        for method, path, body, kind in NAMED:
            for id_ in things[kind]:
                foreign = await world.b.request(method, path, json=body(id_, own))
                unknown = await world.b.request(method, path, json=body(UNKNOWN[kind], own))
                assert foreign.status_code in (400, 404), (path, id_, foreign.text)
                same(foreign, unknown, id_, UNKNOWN[kind])
        for path, kind in AFTER:
            for id_ in things[kind]:
                foreign = await world.b.get(path, params={"after": id_})
                same(foreign, await world.b.get(path, params={"after": UNKNOWN[kind]}), id_, UNKNOWN[kind])
                assert foreign.status_code == 400
        for path in ("/v1/adapters", "/v1/fine_tuning/jobs"):
            assert (await world.b.get(path)).json()["data"] == []
        assert [m["id"] for m in (await world.b.get("/v1/models")).json()["data"]] == ["base"]
        assert [f["id"] for f in (await world.b.get("/v1/files")).json()["data"]] == [own]
        assert await snapshot(world, things) == before, "nothing of a changed"

    in_world(tmp_path, scenario)


async def snapshot(world, things):
    """What tenant a sees of its own things."""
    urls = [f"/v1/files/{id_}" for id_ in things["file"]] + [f"/v1/fine_tuning/jobs/{id_}" for id_ in things["job"]]
    urls += [f"/v1/adapters/{id_}" for id_ in things["adapter"]] + [f"/v1/models/{id_}" for id_ in things["model"]]
    answers = [await world.a.get(url) for url in urls]
    assert all(answer.status_code == 200 for answer in answers)
    return [answer.json() for answer in answers]


def test_every_route_asks_for_a_key(tmp_path):
    async def scenario(world):
        for entry in route_table(ROUTERS):
            answer = await world.nobody.request(
                entry.method, with_id(entry.path, "x") if "{" in entry.path else entry.path
            )
            assert (answer.status_code == 401) == (entry.access is not Access.PUBLIC), entry
            if entry.access is Access.ADMIN:
                url = with_id(entry.path, "x") if "{" in entry.path else entry.path
                assert (await world.a.request(entry.method, url)).status_code == 403

    in_world(tmp_path, scenario)


@pytest.mark.parametrize(
    "id_",
    ["..", "../x", "..%2Fx", "%2e%2e%2f%2e%2e", "/etc/passwd", "a/../b", "x\\y", "%00", "x%00y", "%2e%2e", "a%0Ab"],
)
def test_ids_that_lead_elsewhere(tmp_path, id_):
    """400 where an id may hold slashes, 404 where it may not: in no case anything of the file system."""

    async def scenario(world):
        await world.upload()
        for method, path in MATRIX:
            answer = await world.a.request(method, with_id(path, id_))
            assert answer.status_code in (400, 404, 405), (method, path, answer.status_code)
            assert set(answer.json()) == {"error"}
            assert "root:" not in answer.text and str(tmp_path) not in answer.text
        assert (await world.a.get("/v1/files")).json()["data"], "the file is still there"

    in_world(tmp_path, scenario)
