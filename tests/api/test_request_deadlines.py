"""Deadlines on their way from settings and bodies to the engine, and what a client reads when its time is up."""

from __future__ import annotations

import asyncio
import time

import pytest
from http_gateway import RawClient, aborted, first_request, give, listening, requests
from scripted_engine import in_world

from coserve.server.wire.messages import Failed

ASK = {"model": "base", "prompt": "hi", "max_tokens": 4}
LIMITS = {"request_timeout_seconds": 60, "tenants": {"a": {"request_timeout_seconds": 30}}}


def expire(world, request):
    """What the engine says at the deadline."""
    world.engine.push(Failed.past_deadline(request))


async def had(world, number, client=None, **more):
    """Seconds between arrival and deadline of the sequence that a request becomes."""
    asking = asyncio.create_task((client or world.a).post("/v1/completions", json={**ASK, **more}))
    request = await first_request(world, number)
    give(world, request, 40, finish="stop")
    assert (await asking).status_code == 200
    return None if request.deadline is None else pytest.approx(request.deadline - request.arrived)


def test_the_tenants_time_is_the_servers_unless_its_entry_says_so_and_a_request_may_have_less(tmp_path):
    async def scenario(world):
        assert await had(world, 1) == 30.0
        assert await had(world, 2, world.b) == 60.0
        assert await had(world, 3, request_timeout_seconds=30) == 30.0
        assert await had(world, 4, request_timeout_seconds=9.5) == 9.5
        assert await had(world, 5, request_timeout_seconds=None) == 30.0

    in_world(tmp_path, scenario, **LIMITS)


def test_without_a_setting_only_those_that_ask_have_a_deadline(tmp_path):
    async def scenario(world):
        assert await had(world, 1) is None
        assert await had(world, 2, request_timeout_seconds=3600) == 3600.0

    in_world(tmp_path, scenario)


@pytest.mark.parametrize(
    "asked, says",
    [(31, "your requests have 30 s at most; ask for as much or less"), (0, "greater than 0"), ("5", "number"),
     (True, "number"), (1e9, "86400")],
)  # fmt: skip
def test_more_time_than_there_is_is_refused_with_the_figure(tmp_path, asked, says):
    async def scenario(world):
        answer = await world.a.post("/v1/completions", json={**ASK, "request_timeout_seconds": asked})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "request_timeout_seconds")
        assert says in error["message"], error
        assert not requests(world)

    in_world(tmp_path, scenario, **LIMITS)


def test_an_unanswered_request_is_408_that_no_client_repeats_and_all_its_choices_end(tmp_path):
    async def scenario(world):
        body = {**ASK, "n": 3, "request_timeout_seconds": 9}
        asking = asyncio.create_task(world.a.post("/v1/completions", json=body))
        last = await first_request(world, 3)
        give(world, requests(world)[0], 40, finish="stop")
        give(world, requests(world)[1], 41)
        expire(world, last)
        answer = await asking
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (408, "deadline_exceeded", "invalid_request_error")
        assert "9 s" in error["message"] and "request_timeout_seconds" in error["message"]
        assert answer.headers["x-should-retry"] == "false", "OpenAI's client repeats a 408 by itself"
        await world.until(lambda: aborted(world) == [requests(world)[1].request_id])
        text = (await world.admin.get("/metrics")).text
        assert 'coserve_generation_requests_total{result="expired"} 1.0' in text
        assert 'coserve_slo_requests_total{result="missed"} 1.0' in text

    in_world(tmp_path, scenario)


def test_a_stream_that_has_begun_ends_with_an_error_event(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", {**ASK, "stream": True, "request_timeout_seconds": 9})
            request = await first_request(world)
            give(world, request, 40)
            events = client.events()
            assert (await anext(events))["choices"][0]["text"]
            expire(world, request)
            assert [event["error"]["code"] for event in [event async for event in events]] == ["deadline_exceeded"]
            client.close()

    in_world(tmp_path, scenario)


def test_the_next_engine_is_told_the_old_deadline_and_none_is_needed_to_keep_it(tmp_path):
    async def scenario(world):
        asking = asyncio.create_task(world.a.post("/v1/completions", json={**ASK, "request_timeout_seconds": 3}))
        first = await first_request(world)
        await world.engine.crash()
        second = await first_request(world, 2)
        assert second.request_id != first.request_id and second.deadline == first.deadline
        await world.engine.stop()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline_exceeded")
        assert time.monotonic() < first.deadline + 10.0
        await world.until(lambda: world.services.generation.running == 0)

    in_world(tmp_path, scenario)
