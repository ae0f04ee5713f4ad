"""A checkpoint that its owner lets others ask: they may ask it, and nothing else, until they may not."""

import asyncio

import httpx
import openai
from openai import AsyncOpenAI
from scripted_engine import in_world

from coserve.server.wire.messages import Generate, Tokens

URL = "/v1/fine_tuning/checkpoints"


def official(world, client):
    """OpenAI's own client with the key of one of the world's clients."""
    key = client.headers["authorization"].removeprefix("Bearer ")
    plain = httpx.AsyncClient(transport=client._transport)
    return AsyncOpenAI(base_url="http://coserve/v1", api_key=key, http_client=plain, max_retries=0)


async def trained(world):
    """Ids of a finished job's model and of its checkpoint at step 1; the engine answers whoever asks."""
    plain = world.engine._answer
    world.engine._answer = lambda message: (
        Tokens(message.request_id, (40,), "length", 0) if isinstance(message, Generate) else plain(message)
    )
    job_id = await world.running(suffix="s")
    world.engine.checkpoint(job_id, 1, b"at one")
    world.engine.finish(job_id)
    model = (await world.status(job_id, "succeeded"))["fine_tuned_model"]
    return model, f"{model}:ckpt-step-1"


def test_a_grant_is_for_asking_and_for_nothing_else(tmp_path):
    async def scenario(world):
        model, checkpoint = await trained(world)
        a, b = official(world, world.a), official(world, world.b)
        for shared in (checkpoint, model):

            async def ask(shared=shared):
                return await b.completions.create(model=shared, prompt="hi", max_tokens=1)

            for refused in (ask, lambda shared=shared: b.models.retrieve(shared)):
                try:
                    await refused()
                except openai.NotFoundError as error:
                    assert error.code == "model_not_found"
                else:
                    raise AssertionError("it was there before it was granted")
            page = await a.fine_tuning.checkpoints.permissions.create(shared, project_ids=["b", "later", "b"])
            assert [one.project_id for one in page.data] == ["b", "later"]
            assert all(one.object == "checkpoint.permission" and one.id.startswith("cp_") for one in page.data)
            assert (await ask()).model == shared
            own, granted = (await a.completions.create(model=shared, prompt="hi", max_tokens=1)), None
            granted, own = world.engine.of(Generate)[-2:]
            assert granted.adapter == own.adapter and granted.salt != own.salt and granted.tenant != own.tenant
            seen = await b.models.retrieve(shared)
            assert seen == await a.models.retrieve(shared) and seen.owned_by == "a"
            assert shared not in (await world.b.get("/v1/models")).text

            mine = await world.upload(world.b)
            for body in ({"model": shared}, {"model": "base", "adapter": {"init": f"adapter:{shared}"}}):
                job = await world.b.post("/v1/fine_tuning/jobs", json={"training_file": mine, **body})
                assert job.status_code in (400, 404), "the weights are not shared"
            for method, url in (
                ("GET", f"/v1/adapters/{shared}/download"), ("DELETE", f"/v1/models/{shared}"),
                ("GET", f"{URL}/{shared}/permissions"), ("POST", f"{URL}/{shared}/permissions"),
                ("DELETE", f"{URL}/{shared}/permissions/{page.data[0].id}"),
            ):  # fmt: skip
                assert (await world.b.request(method, url)).status_code == 404, (method, url)

            gone = await a.fine_tuning.checkpoints.permissions.delete(
                page.data[0].id, fine_tuned_model_checkpoint=shared
            )
            assert gone.deleted and gone.id == page.data[0].id
            assert (await world.b.get(f"/v1/models/{shared}")).status_code == 404
            again = await world.a.delete(f"{URL}/{shared}/permissions/{page.data[0].id}")
            assert (again.status_code, again.json()["error"]["code"]) == (404, "permission_not_found")
            foreign = await world.b.post("/v1/completions", json={"model": shared, "prompt": "hi"})
            assert foreign.status_code == 404

    in_world(tmp_path, scenario)


def test_a_grant_ends_with_its_model(tmp_path):
    async def scenario(world):
        model, checkpoint = await trained(world)
        for shared in (model, checkpoint):
            granted = await world.a.post(f"{URL}/{shared}/permissions", json={"project_ids": ["b"]})
            assert granted.status_code == 200 and granted.json()["has_more"] is False
            assert (await world.b.get(f"/v1/models/{shared}")).status_code == 200
        assert (await world.a.delete(f"/v1/models/{model}")).status_code == 200
        assert (await world.b.get(f"/v1/models/{model}")).status_code == 404
        assert (await world.a.get(f"{URL}/{model}/permissions")).status_code == 404
        assert (await world.b.get(f"/v1/models/{checkpoint}")).status_code == 200

    in_world(tmp_path, scenario)


def test_permissions_are_paged_and_filtered(tmp_path):
    async def scenario(world):
        _, checkpoint = await trained(world)
        permissions = official(world, world.a).fine_tuning.checkpoints.permissions
        for number in range(5):
            await permissions.create(checkpoint, project_ids=[f"p{number}"])
        first = await permissions.create(checkpoint, project_ids=["p0"])
        seen = [one.project_id async for one in permissions.list(checkpoint, limit=2)]
        assert seen == ["p4", "p3", "p2", "p1", "p0"], "granted twice is granted once"
        oldest = [one.project_id async for one in permissions.list(checkpoint, limit=2, order="ascending")]
        assert oldest == seen[::-1]
        one = [one.id async for one in permissions.list(checkpoint, project_id="p0")]
        assert one == [first.data[0].id]
        page = (await world.a.get(f"{URL}/{checkpoint}/permissions?limit=2")).json()
        assert page["first_id"] == page["data"][0]["id"] and page["last_id"] == page["data"][1]["id"]

    in_world(tmp_path, scenario)


BAD = [
    ({}, "project_ids"), ({"project_ids": []}, "project_ids"), ({"project_ids": "b"}, "project_ids"),
    ({"project_ids": [5]}, "project_ids[0]"), ({"project_ids": ["b", ""]}, "project_ids[1]"),
    ({"project_ids": ["../x"]}, "project_ids[0]"), ({"project_ids": ["x" * 65]}, "project_ids[0]"),
    ({"project_ids": ["b\n"]}, "project_ids[0]"), ({"project_ids": ["b"] * 101}, "project_ids"),
    ({"project_ids": ["b"], "role": "admin"}, "role"),
]  # fmt: skip


def test_bad_requests_are_named(tmp_path):
    async def scenario(world):
        _, checkpoint = await trained(world)
        for body, param in BAD:
            answer = await world.a.post(f"{URL}/{checkpoint}/permissions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (body, answer.text)
        for query in ("limit=0", "limit=101", "order=up", "after=cp_none"):
            assert (await world.a.get(f"{URL}/{checkpoint}/permissions?{query}")).status_code == 400
        for unknown in ("base", "nothing", f"{checkpoint}0", "a/b", "%00"):
            answer = await world.a.post(f"{URL}/{unknown}/permissions", json={"project_ids": ["b"]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "checkpoint_not_found")
        raced = await asyncio.gather(
            *(world.a.post(f"{URL}/{checkpoint}/permissions", json={"project_ids": ["b"]}) for _ in range(5))
        )
        assert len({answer.json()["data"][0]["id"] for answer in raced}) == 1

    in_world(tmp_path, scenario)
