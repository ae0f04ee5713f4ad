"""Classes, promises and shares on their way from the API to the engine, and what is told of who waits."""

from __future__ import annotations

import asyncio

import pytest
from http_gateway import RawClient, first_request, give, listening
from scripted_engine import in_world

from coserve.server.wire.messages import QueuedRequest, StartJob, Stats, TenantShare

# The scripted engine promises 50 ms and 1 s, and to batch requests 200 ms and 10 s.
ASK = {"model": "base", "prompt": "hi", "max_tokens": 4}
TENANTS = {"a": {"weight": 3.0, "ttft_ms": 500, "kv_share": 0.5}}


async def sent(world, number=1, client=None, **more):
    """The sequence that a request becomes, and the answer."""
    asking = asyncio.create_task((client or world.a).post("/v1/completions", json={**ASK, **more}))
    request = await first_request(world, number)
    give(world, request, 40, finish="stop")
    return request, (await asking).json()


def test_a_tier_is_a_class_with_its_promises(tmp_path):
    async def scenario(world):
        plain, answer = await sent(world)
        assert (plain.slo_class, plain.ttft_seconds, plain.itl_seconds) == ("interactive", 1.0, 0.05)
        assert "service_tier" not in answer
        batch, answer = await sent(world, 2, service_tier="flex")
        assert (batch.slo_class, batch.ttft_seconds, batch.itl_seconds) == ("batch", 10.0, 0.2)
        assert answer["service_tier"] == "flex"
        priority, answer = await sent(world, 3, service_tier="priority")
        assert priority.slo_class == "interactive" and answer["service_tier"] == "default"
        loose, _ = await sent(world, 4, slo={"ttft_ms": 5000})
        assert (loose.ttft_seconds, loose.itl_seconds) == (5.0, 0.05)
        batch, _ = await sent(world, 5, service_tier="flex", slo={"itl_ms": 200, "ttft_ms": 60_000})
        assert (batch.ttft_seconds, batch.itl_seconds) == (60.0, 0.2)

    in_world(tmp_path, scenario)


@pytest.mark.parametrize(
    "more, param, says",
    [
        ({"service_tier": "gold"}, "service_tier", "flex"),
        ({"service_tier": 1}, "service_tier", "flex"),
        ({"slo": {"itl_ms": 20}}, "slo.itl_ms", "50 ms that you are promised in the service tier 'auto'"),
        ({"slo": {"ttft_ms": 5000}, "service_tier": "flex"}, "slo.ttft_ms", "10000 ms"),
        ({"slo": {"itl_ms": 0}}, "slo.itl_ms", "greater than 0"),
        ({"slo": {"itl_ms": "100"}}, "slo.itl_ms", "number"),
        ({"slo": {"itl": 100}}, "slo.itl", ""),
        ({"slo": 100}, "slo", ""),
    ],
    ids=str,
)
def test_what_cannot_be_promised_is_refused_with_the_figure(tmp_path, more, param, says):
    async def scenario(world):
        answer = await world.a.post("/v1/completions", json={**ASK, **more})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert says in error["message"], error
        assert not world.engine.received or not [m for m in world.engine.received if hasattr(m, "prompt_ids")]

    in_world(tmp_path, scenario)


def test_a_tenants_terms_go_with_its_requests_and_jobs_and_with_nobody_elses(tmp_path):
    async def scenario(world):
        mine, _ = await sent(world)
        assert mine.share == TenantShare(3.0, 0.5, 0.25, 1.0) and mine.ttft_seconds == 0.5
        tight, _ = await sent(world, 2, slo={"ttft_ms": 600})
        assert tight.ttft_seconds == 0.6
        other, _ = await sent(world, 3, client=world.b)
        assert other.share == TenantShare(1.0, 1.0, 0.25, 1.0) and other.ttft_seconds == 1.0
        await world.running()
        assert [start.share.weight for start in world.engine.of(StartJob)] == [3.0]

    in_world(tmp_path, scenario, tenants=TENANTS, tenant_prefix_share=0.25)


def test_a_batch_request_is_promised_no_more_than_an_interactive_one_of_its_tenant(tmp_path):
    async def scenario(world):
        batch, _ = await sent(world, service_tier="flex")
        assert (batch.ttft_seconds, batch.itl_seconds) == (30.0, 0.4)
        said, _ = await sent(world, 2, client=world.b, service_tier="flex")
        assert (said.ttft_seconds, said.itl_seconds) == (20.0, 0.2), "but where its entry says so"

    slow = {"ttft_ms": 30_000, "itl_ms": 400}
    in_world(tmp_path, scenario, tenants={"a": slow, "b": {"ttft_ms": 30_000, "batch_ttft_ms": 20_000}})


def test_who_waits_is_told_where_and_why_and_sees_only_its_own(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", {**ASK, "stream": True})
            request = await first_request(world)
            queue = (QueuedRequest("x/0", 1, "why", 2.0), QueuedRequest(request.request_id, 2, "for a place", 4.25))
            world.engine.push(Stats(0.0, {}, {}, queued=queue))
            await world.until(lambda: world.services.engine.stats is not None)
            (mine,) = (await world.a.get("/v1/coserve/queue")).json()["data"]
            assert mine == {
                "id": request.request_id.split("/")[0], "object": "coserve.queued_sequence", "index": 0, "position": 2,
                "reason": "for a place", "expected_wait_seconds": 4.25,
            }  # fmt: skip
            assert (await world.b.get("/v1/coserve/queue")).json()["data"] == []
            heartbeat = (
                await client.head(),
                await client.reader.readuntil(b": keepalive"),
                await client.reader.readline(),
            )
            assert heartbeat[2] == b": position 2 in the queue, about 4.2 s; for a place\n"
            give(world, request, 40, finish="stop")
            assert [event async for event in client.events()][-1] == "[DONE]"
            assert (await world.a.get("/v1/coserve/queue")).json()["data"] == []
            client.close()

    in_world(tmp_path, scenario, keepalive_seconds=0.2)
