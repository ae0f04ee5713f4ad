"""The two ends of the socket against each other: order, replacement, broken peers, peers that do not read."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
import time
from pathlib import Path

import pytest

from coserve.server.wire.codec import encode
from coserve.server.wire.messages import Abort, Drained, Failed, Generate, SamplingParams, Tokens
from coserve.server.wire.stream import MessageStream
from coserve.server.wire.sync import Connected, Disconnected, EngineSocket


@pytest.fixture
def path():
    with tempfile.TemporaryDirectory(prefix="cs-") as folder:
        yield str(Path(folder) / "engine.sock")


@pytest.fixture
def engine(path):
    engine = EngineSocket(path, max_unsent_bytes=1 << 20)
    engine.start()
    yield engine
    engine.close()


def collect(engine: EngineSocket, count: int, timeout: float = 60.0) -> list:
    """Polls until `count` messages are in, or fails."""
    found, deadline = [], time.monotonic() + timeout
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {found} of {count}"
        engine.wait(0.05)
        found += engine.poll()
    return found


def connect(path: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(60)
    peer.connect(path)
    return peer


def generate(index: int, prompt: int = 3) -> Generate:
    return Generate(f"r{index}", "t", tuple(range(prompt)), SamplingParams(4, index), None, "salt", 0.0)


def test_messages_keep_their_order_both_ways(engine, path):
    async def gateway():
        stream = await MessageStream.open_unix(path)
        for index in range(200):
            await stream.send(generate(index, prompt=index * 50))
        got = [await asyncio.wait_for(stream.receive(), 60) for _ in range(200)]
        await stream.close()
        return got

    async def both():
        task = asyncio.create_task(gateway())
        seen = await asyncio.to_thread(collect, engine, 201)
        for message in seen[1:]:
            assert engine.send(Tokens(message.request_id, (1, 2), "stop", 0))
        return seen, await task

    seen, got = asyncio.run(both())
    assert seen[0] == Connected()
    assert [m.request_id for m in seen[1:]] == [f"r{i}" for i in range(200)]
    assert len(seen[200].prompt_ids) == 199 * 50
    assert [m.request_id for m in got] == [f"r{i}" for i in range(200)]
    assert collect(engine, 1) == [Disconnected("it closed the connection")]
    assert not engine.connected and not engine.send(Drained())


def test_the_socket_is_private_and_removed(path):
    engine = EngineSocket(path)
    engine.start()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    engine.close()
    engine.close()
    assert not os.path.exists(path)


def test_a_dead_engines_socket_is_replaced_but_no_other_file(path):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    engine = EngineSocket(path)
    engine.start()
    connect(path).close()
    collect(engine, 2)
    engine.close()
    Path(path).write_text("mine")
    with pytest.raises(FileExistsError, match="not a socket"):
        EngineSocket(path).start()
    assert Path(path).read_text() == "mine"


def test_a_path_too_long_for_a_socket_is_said_so():
    with pytest.raises(ValueError, match="TMPDIR"):
        EngineSocket("/tmp/" + "x" * 120)


def test_a_new_connection_replaces_the_old_one(engine, path):
    with connect(path) as first:
        assert collect(engine, 1) == [Connected()]
        engine.send(Drained())
        first.recv(100)
        with connect(path) as second:
            assert collect(engine, 2) == [Disconnected("a new gateway has connected"), Connected()]
            assert first.recv(100) == b""
            assert engine.send(Abort("x"))
            assert second.recv(100) == encode(Abort("x"))


def test_nothing_is_sent_to_a_connection_not_yet_polled(engine, path):
    with connect(path) as peer:
        engine.wait(60)
        assert not engine.send(Abort("before"))
        assert engine.poll() == [Connected()]
        assert engine.send(Abort("after"))
        assert peer.recv(100) == encode(Abort("after"))


def test_messages_of_the_old_connection_come_before_its_end(engine, path):
    with connect(path) as first:
        first.sendall(encode(Abort("a")) + encode(Abort("b")))
    assert collect(engine, 4) == [Connected(), Abort("a"), Abort("b"), Disconnected("it closed the connection")]


@pytest.mark.parametrize("junk", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x00", os.urandom(64)])
def test_junk_ends_the_connection_not_the_engine(engine, path, junk):
    with connect(path) as peer:
        peer.sendall(junk)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(100) == b""
    assert [type(m) for m in collect(engine, 2)] == [Connected, Disconnected]
    with connect(path) as peer:
        peer.sendall(encode(Abort("still here")))
        assert collect(engine, 2) == [Connected(), Abort("still here")]


def test_a_frame_in_single_bytes(engine, path):
    with connect(path) as peer:
        for byte in encode(Abort("slow")):
            peer.sendall(bytes([byte]))
        assert collect(engine, 2) == [Connected(), Abort("slow")]


def test_a_gateway_that_does_not_read_is_disconnected_and_send_never_blocks(engine, path):
    with connect(path):
        collect(engine, 1)
        slowest, sent = 0.0, 0
        while True:
            start = time.perf_counter()
            taken = engine.send(Failed("r", "c", "x" * 10_000))
            slowest = max(slowest, time.perf_counter() - start)
            if not taken:
                break
            sent += 1
            assert sent < 1000
        assert sent > 50 and slowest < 10, "nobody ever reads"
        assert "unread" in collect(engine, 1)[0].reason


def test_a_backlog_is_delivered_whole_when_the_gateway_reads_again(engine, path):
    with connect(path) as peer:
        collect(engine, 1)
        frames = b"".join(encode(Failed(f"r{i}", "c", "x" * 5000)) for i in range(150))
        for i in range(150):
            assert engine.send(Failed(f"r{i}", "c", "x" * 5000))
        received = bytearray()
        while len(received) < len(frames):
            received += peer.recv(65536)
        assert received == frames


def test_the_stream_reports_the_end_and_refuses_to_send_after_it(engine, path):
    async def gateway():
        stream = await MessageStream.open_unix(path)
        await asyncio.to_thread(engine.close)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(stream.receive(), 60)
        await stream.close()
        with pytest.raises(ConnectionError):
            stream.post(Abort("x"))
        with pytest.raises(OSError):
            await MessageStream.open_unix(path)

    asyncio.run(gateway())


def test_wait_returns_at_once_when_closed_or_idle(engine):
    start = time.monotonic()
    assert engine.wait(0.05) is False
    assert 0.04 < time.monotonic() - start < 10
