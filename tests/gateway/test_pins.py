"""What tenants pin is what the engine holds: after a refusal, an engine's restart, a new version, a deletion."""

from __future__ import annotations

import asyncio

from scripted_engine import ScriptedEngine, gateway, in_world

from coserve.server.store.datadir import DataDirectory
from coserve.server.wire.messages import PinAdapters

URL = "/v1/adapters"
CONFIG = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'


async def upload(client, name: str, content: bytes) -> dict:
    files = [
        ("file", ("adapter_config.json", CONFIG)),
        ("file", ("adapter_model.safetensors", content)),
    ]
    answer = await client.post(URL, files=files, data={"name": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


def held(world) -> list[str]:
    """What the engine was told last."""
    told = world.engine.of(PinAdapters)
    return [version.digest for version in told[-1].versions] if told else []


def test_a_pin_reaches_the_engine_and_a_refused_one_is_not_entered(tmp_path):
    async def scenario(world):
        one, two = await upload(world.a, "one", b"1"), await upload(world.b, "two", b"2")
        assert (await world.a.post(f"{URL}/one/pin")).json()["pinned"] is True
        assert held(world) == [one["digest"]]
        assert (await world.a.post(f"{URL}/one/pin")).json()["pinned"] is True, "again is no error"
        world.engine.pins_refused = {two["digest"]: "it would fill the pool"}
        answer = await world.b.post(f"{URL}/two/pin")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_memory_full")
        assert "fill the pool" in answer.json()["error"]["message"]
        assert (await world.b.get(f"{URL}/two")).json()["pinned"] is False
        await world.until(lambda: held(world) == [one["digest"]])
        world.engine.pins_refused = {}
        assert (await world.b.post(f"{URL}/two/pin")).json()["pinned"] is True
        assert sorted(held(world)) == sorted([one["digest"], two["digest"]])
        assert (await world.a.post(f"{URL}/one/unpin")).json()["pinned"] is False
        await world.until(lambda: held(world) == [two["digest"]])

    in_world(tmp_path, scenario)


def test_a_new_version_takes_the_pin_over_and_a_deletion_ends_it(tmp_path):
    async def scenario(world):
        world.services.adapters._pins._look_seconds = 0.05
        await upload(world.a, "one", b"1")
        await world.a.post(f"{URL}/one/pin")
        newer = await upload(world.a, "one", b"2")
        await world.until(lambda: held(world) == [newer["digest"]])
        await world.a.delete(f"{URL}/one")
        await world.until(lambda: held(world) == [])

    in_world(tmp_path, scenario)


def test_an_engine_that_starts_again_is_told_and_one_that_is_away_takes_no_pin(tmp_path):
    async def scenario(world):
        one, two = await upload(world.a, "one", b"1"), await upload(world.a, "two", b"2")
        await world.a.post(f"{URL}/one/pin")
        world.engine.received.clear()
        await world.engine.crash()
        await world.until(lambda: held(world) == [one["digest"]])
        await world.engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        answer = await world.a.post(f"{URL}/two/pin")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert (await world.a.get(f"{URL}/two")).json()["pinned"] is False
        assert (await world.a.post(f"{URL}/one/unpin")).json()["pinned"] is False, "no engine is needed for that"
        await world.engine.start()
        await world.until(lambda: world.services.engine.engine is not None)
        assert (await world.a.post(f"{URL}/two/pin")).json()["pinned"] is True
        assert held(world) == [two["digest"]]

    in_world(tmp_path, scenario)


def test_pins_outlive_the_gateway(tmp_path):
    async def run():
        data = DataDirectory(tmp_path / "data")
        data.prepare()
        engine = ScriptedEngine(data.root)
        await engine.start()
        try:
            async with gateway(tmp_path, engine) as world:
                await world.until(lambda: world.services.engine.engine is not None)
                one = await upload(world.a, "one", b"1")
                await world.a.post(f"{URL}/one/pin")
            engine.received.clear()
            async with gateway(tmp_path, engine) as world:
                await world.until(lambda: held(world) == [one["digest"]])
        finally:
            await engine.close()

    asyncio.run(run())
