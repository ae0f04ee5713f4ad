"""Clients that disconnect, do not read, or come in too great numbers: what they used is given back at once."""

import asyncio
import json
import time

from http_gateway import RawClient, aborted, first_request, give, listening, requests
from scripted_engine import in_world

AT_ONCE = 8  # seconds, on a machine that does other things: the next write to a client comes after fifteen
STREAM = {"model": "base", "prompt": "hello", "stream": True, "max_tokens": 200}


async def ledger(world):
    tenant = requests(world)[0].tenant
    return await world.services.store.usage.totals(tenant)


def test_a_stream_that_is_closed_is_aborted_and_paid_for(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", STREAM)
            request = await first_request(world)
            give(world, request, 40, 41, 42, cached=1)
            await anext(client.events())
            closed = time.monotonic()
            client.close()
            await world.until(lambda: aborted(world) == [request.request_id], seconds=AT_ONCE)
            assert time.monotonic() - closed < AT_ONCE

            async def written():
                totals = await ledger(world)
                return totals.requests == 1 and (totals.completion_tokens, totals.cached_tokens) == (3, 1)

            await world.until(written)
            assert world.services.generation.running == 0

    in_world(tmp_path, scenario)


def test_a_plain_request_and_a_queued_stream_too(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            for count, body in enumerate(({**STREAM, "stream": False}, STREAM), 1):
                client = await RawClient.open(port)
                client.post(world, "/v1/completions", body)
                request = await first_request(world, count)
                client.close()
                await world.until(lambda request=request: request.request_id in aborted(world), seconds=AT_ONCE)

                async def written(count=count):
                    return (await ledger(world)).requests == count

                await world.until(written)
            assert world.services.generation.admission.waiting == 0

    in_world(tmp_path, scenario)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_server(tmp_path, caplog):
    caplog.set_level("INFO")

    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            key = world.a.headers["authorization"]
            client.writer.write(
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\n"
                'content-type: application/json\r\ncontent-length: 100\r\n\r\n{"model"'.encode()
            )
            await client.writer.drain()
            await asyncio.sleep(0.1)
            client.close()
            await world.until(lambda: "POST /v1/completions 499" in caplog.text)
            assert "unexpected" not in caplog.text

    in_world(tmp_path, scenario)


def test_all_choices_of_a_closed_stream_are_aborted(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", {**STREAM, "n": 4})
            give(world, await first_request(world, 4), 40)
            await anext(client.events())
            client.close()
            await world.until(lambda: len(aborted(world)) == 4, seconds=AT_ONCE)

    in_world(tmp_path, scenario)


def test_a_client_that_does_not_read_loses_its_stream_and_others_do_not_notice(tmp_path):
    async def scenario(world):
        async with listening(world, stall_seconds=0.5, stream_buffer=32 * 1024) as port:
            lazy = await RawClient.open(port, limit=1024)
            lazy.post(world, "/v1/completions", {**STREAM, "max_tokens": 250})
            lazy.writer.transport.pause_reading()
            request = await first_request(world)
            diligent = await RawClient.open(port)
            diligent.post(world, "/v1/completions", {**STREAM, "max_tokens": 250})
            other = await first_request(world, 2)
            events = diligent.events()
            slowest, given = 0.0, 0
            deadline = time.monotonic() + 20
            while not aborted(world):
                assert time.monotonic() < deadline
                if given < 100_000:  # more than a real engine says, to fill the buffers
                    give(world, request, *[75] * 2_000)
                    given += 2_000
                sent = time.monotonic()
                give(world, other, 40)
                await anext(events)
                slowest = max(slowest, time.monotonic() - sent)
            assert aborted(world) == [request.request_id]
            assert slowest < 1
            give(world, other, 41, finish="length")
            assert [event async for event in events][-1] == "[DONE]"

    in_world(tmp_path, scenario)


def test_a_slow_but_steady_reader_keeps_its_stream(tmp_path):
    async def scenario(world):
        async with listening(world, stall_seconds=0.5) as port:
            client = await RawClient.open(port, limit=1024)
            client.post(world, "/v1/completions", STREAM)
            request = await first_request(world)
            for _ in range(10):
                give(world, request, 75)
                await asyncio.sleep(0.12)  # longer than the bound in all
            give(world, request, 75, finish="length")
            assert [event async for event in client.events()][-1] == "[DONE]"
            assert not aborted(world)

    in_world(tmp_path, scenario)


def test_a_long_wait_is_bridged_by_comments(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            client.post(world, "/v1/completions", STREAM)
            events = client.events()
            assert await anext(events) is None
            assert await anext(events) is None
            give(world, await first_request(world), 40, finish="length")
            rest = [event async for event in events if event is not None]
            assert rest[-1] == "[DONE]" and rest[0]["choices"][0]["text"]

    in_world(tmp_path, scenario, keepalive_seconds=0.05)


def test_queues_are_bounded_in_all_and_for_each_tenant(tmp_path):
    async def scenario(world):
        body = {**STREAM, "stream": False, "max_tokens": 4}
        asking = [asyncio.create_task(world.a.post("/v1/completions", json={**body, "n": 2})) for _ in range(2)]
        await first_request(world, 4)
        refused = await world.a.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after-ms"]) > 0
        others = asyncio.create_task(world.b.post("/v1/completions", json={**body, "n": 2}))
        await first_request(world, 6)
        assert (await world.b.post("/v1/completions", json=body)).status_code == 429, "six wait in all"
        for request in requests(world):
            give(world, request, 40)
        await world.until(lambda: world.services.generation.admission.waiting == 0)
        more = asyncio.create_task(world.a.post("/v1/completions", json=body))
        await first_request(world, 7)
        for request in requests(world):
            give(world, request, 41, finish="length")
        for answer in await asyncio.gather(*asking, others, more):
            assert answer.status_code == 200

    in_world(tmp_path, scenario, max_waiting=6, max_waiting_tenant=4)


def test_malformed_http_and_too_many_connections_get_json(tmp_path):
    async def scenario(world):
        async with listening(world, max_connections=2) as port:
            client = await RawClient.open(port)
            client.writer.write(b"NONSENSE\r\n\r\n")
            reply = (await client.reader.read()).decode()
            assert reply.startswith("HTTP/1.1 400")
            assert json.loads(reply.split("\r\n\r\n")[1])["error"]["code"] == "invalid_http"
            assert "\r\nx-request-id: req_" in reply
            held = [await RawClient.open(port) for _ in range(2)]
            await asyncio.sleep(0.05)
            third = await RawClient.open(port)
            reply = (await third.reader.read()).decode()
            assert reply.startswith("HTTP/1.1 503")
            assert json.loads(reply.split("\r\n\r\n")[1])["error"]["code"] == "engine_unavailable"
            assert "\r\nx-request-id: req_" in reply
            held[0].post(world, "/v1/chat/completions", {"model": "x"})
            assert "400" in await held[0].head()
            for one in held:
                one.close()

    in_world(tmp_path, scenario)


def test_a_body_that_is_too_large_gets_its_answer_while_the_client_still_writes(tmp_path):
    async def scenario(world):
        async with listening(world) as port:
            client = await RawClient.open(port)
            key = world.a.headers["authorization"]
            client.writer.write(
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\n"
                "content-type: application/json\r\ncontent-length: 20000000\r\n\r\n".encode()
            )
            for _ in range(20):
                client.writer.write(b" " * 1_000_000)
                await client.writer.drain()
            assert "413" in await client.head()

    in_world(tmp_path, scenario)
