"""What becomes of requests when the engine's connection is lost, and how the gateway waits for another."""

import asyncio

import pytest
from http_gateway import RawClient, aborted, first_request, give, listening, requests
from scripted_engine import in_world

from coserve.server.gateway.engine_client import EngineUnavailable
from coserve.server.wire.messages import Failed, Stats

STREAM = {"model": "base", "prompt": "hi", "stream": True, "max_tokens": 8}
PLAIN = {"model": "base", "prompt": "hi", "max_tokens": 8}


def test_a_request_that_has_not_started_is_sent_to_the_next_engine(tmp_path):
    async def scenario(world):
        asking = asyncio.create_task(world.a.post("/v1/completions", json=PLAIN))
        first = await first_request(world)
        await world.engine.crash()
        second = await first_request(world, 2)
        assert second.request_id != first.request_id, "late tokens of the first attempt must find nobody"
        assert (second.prompt_ids, second.sampling, second.salt) == (first.prompt_ids, first.sampling, first.salt)
        give(world, first, 70, finish="stop")
        give(world, second, 40, 41, finish="length")
        answer = (await asking).json()
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["choices"][0]["finish_reason"] == "length"

    in_world(tmp_path, scenario)


def test_a_request_that_ends_every_engine_is_given_up(tmp_path):
    async def scenario(world):
        asking = asyncio.create_task(world.a.post("/v1/completions", json=PLAIN))
        for attempt in (1, 2, 3):
            await first_request(world, attempt)
            await world.engine.crash()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_crashed")
        assert answer.headers["x-should-retry"] == "false", "OpenAI's client would go on by itself"
        await world.until(lambda: world.services.engine.ready)
        after = asyncio.create_task(world.a.post("/v1/completions", json=PLAIN))
        give(world, await first_request(world, 4), 40, finish="stop")
        assert (await after).status_code == 200
        assert len(requests(world)) == 4, "nothing of the first was sent again"

    in_world(tmp_path, scenario)


def test_time_without_an_engine_is_no_attempt(tmp_path):
    async def scenario(world):
        asking = asyncio.create_task(world.a.post("/v1/completions", json=PLAIN))
        await first_request(world)
        for _ in range(4):  # connections that end before an engine said that it is ready
            await world.engine.stop()
            await world.engine.start(silent=True)
            seen = world.engine.connections
            await world.until(lambda seen=seen: world.engine.connections > seen)
        await world.engine.crash()
        give(world, await first_request(world, 2), 40, finish="stop")
        assert (await asking).status_code == 200

    in_world(tmp_path, scenario)


def test_a_started_stream_ends_with_an_error_event(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", STREAM)
            give(world, await first_request(world), 40)
            events = client.events()
            assert (await anext(events))["choices"][0]["text"]
            await world.engine.crash()
            rest = [event async for event in events]
            assert [event["error"]["code"] for event in rest] == ["engine_restarted"]
            client.close()
            await world.until(lambda: world.services.generation.running == 0)
            assert len(requests(world)) == 1

    in_world(tmp_path, scenario)


def test_a_started_plain_request_is_503_that_may_be_sent_again(tmp_path):
    async def scenario(world):
        asking = asyncio.create_task(world.a.post("/v1/completions", json=PLAIN))
        give(world, await first_request(world), 40)
        await world.until(lambda: world.services.engine.running == 1)
        await world.engine.crash()
        answer = await asking
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_restarted"
        assert int(answer.headers["retry-after-ms"]) > 0

    in_world(tmp_path, scenario)


def test_readiness_follows_the_engine(tmp_path):
    async def scenario(world):
        assert (await world.nobody.get("/readyz")).status_code == 200
        await world.engine.stop()
        await world.until(lambda: not world.services.engine.ready)
        answer = await world.nobody.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert (await world.nobody.get("/healthz")).status_code == 200
        await asyncio.sleep(0.25)  # past the patience of this test
        answer = await world.a.post("/v1/completions", json=PLAIN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after-ms"]
        await world.engine.start()
        await world.until(lambda: world.services.engine.ready)
        assert (await world.nobody.get("/readyz")).status_code == 200

    in_world(tmp_path, scenario, engine_patience_seconds=0.2)


def test_an_engine_that_falls_silent_is_not_ready(tmp_path):
    async def scenario(world):
        await world.until(lambda: not world.services.engine.ready)

        def heard() -> bool:  # said again at every look: ready lasts for 0.3 s only
            world.engine.push(Stats(0.0, {}, {}))
            return world.services.engine.ready

        await world.until(heard)

    in_world(tmp_path, scenario, engine_silence_seconds=0.3)


def test_calls_fail_when_the_engine_goes_and_work_with_the_next(tmp_path):
    async def scenario(world):
        world.engine.drops_answered = False
        engine = world.services.engine
        call = asyncio.create_task(engine.drop_adapter("a" * 64))
        await asyncio.sleep(0.05)
        await world.engine.crash()
        with pytest.raises(EngineUnavailable):
            await call
        await world.until(lambda: engine.ready)
        assert [one["seq"] for one in (await engine.get_iterations(1)).data] == [2]
        with pytest.raises(EngineUnavailable):
            await engine.drop_adapter("a" * 64, timeout=0.05)

    in_world(tmp_path, scenario)


def test_failures_of_a_sequence(tmp_path):
    async def scenario(world):
        cases = [
            ("adapter_invalid", "tensor q_proj.lora_A has a NaN", 400, True),
            ("out_of_memory", "at 0x7f00 in /secret", 503, False),
            ("adapter_unavailable", "/secret: Input/output error", 503, False),
            ("something_new", "in /secret/path", 500, False),
        ]
        for count, (code, message, status, shown) in enumerate(cases, 1):
            asking = asyncio.create_task(world.a.post("/v1/completions", json=PLAIN))
            request = await first_request(world, count)
            world.engine.push(Failed(request.request_id, code, message))
            answer = await asking
            assert answer.status_code == status
            assert (message in answer.text) == shown
            assert ("retry-after-ms" in answer.headers) == (status == 503)

    in_world(tmp_path, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_right_behind_text_that_is_held_back_is_told(tmp_path, stream):
    """Whoever takes tokens that make no text yet waits for news: the failure behind them must count as such."""

    async def scenario(world):
        text = world.services.text.detokenizer(True, ()).feed(40)
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", {**PLAIN, "stream": stream, "stop": text + "and more"})
            request = await first_request(world)
            if stream:
                give(world, request, 41)
                assert " 200 " in await client.head(), "the answer has begun"
            give(world, request, 40)
            world.engine.push(Failed(request.request_id, "out_of_memory", ""))
            if not stream:
                assert " 503 " in await client.head()
            assert await asyncio.wait_for(client.reader.readuntil(b"out_of_memory"), 30)
            client.close()

    in_world(tmp_path, scenario)


def test_one_failed_choice_ends_the_others(tmp_path):
    async def scenario(world):
        asking = asyncio.create_task(world.a.post("/v1/completions", json={**PLAIN, "n": 3}))
        await first_request(world, 3)
        world.engine.push(Failed(requests(world)[1].request_id, "out_of_memory", ""))
        assert (await asking).status_code == 503
        await world.until(lambda: len(aborted(world)) == 2)

    in_world(tmp_path, scenario)


def test_requests_of_an_earlier_gateway_are_aborted(tmp_path):
    async def scenario(world):
        from coserve.server.wire.messages import EngineReady

        known = world.services.engine.known
        fields = {name: getattr(known, name) for name in EngineReady.__slots__}
        world.engine.push(EngineReady(**{**fields, "running_requests": ("cmpl-old/0",)}))
        await world.until(lambda: aborted(world) == ["cmpl-old/0"])

    in_world(tmp_path, scenario)
