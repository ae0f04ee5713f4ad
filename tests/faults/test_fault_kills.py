"""kill -9, one process after the other, under streams and a job: what was acknowledged is still there."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time

import openai
import pytest
from fault_load import Job, Stream
from live_server import COSERVE, LiveServer, alive

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    data = tmp_path_factory.mktemp("kills") / "data"
    with LiveServer(tiny_model, data, environment={"COSERVE_ENGINE_SILENCE_SECONDS": "4"}) as server:
        yield server


def test_kill_9_of_the_engine(server):
    job = Job(server, 150)
    gateway = server.pid("gateway")
    job.until_step(15)
    stream = Stream(server)
    old = server.kill("engine")
    stream.wait(60)
    assert isinstance(stream.error, openai.APIError) and stream.error.code == "engine_restarted"
    assert stream.pieces and stream.finish is None
    waiting = server.openai(timeout=60, max_retries=5).completions.create(model="tiny", prompt="hi", max_tokens=3)
    assert waiting.usage.completion_tokens >= 1  # asked while there was no engine: it waited
    server.wait_restarted("engine", old)
    assert server.pid("gateway") == gateway and alive(gateway)
    done = job.succeeded()
    assert done.progress["step"] == 150
    # the job went on from a checkpoint, not from its beginning
    steps = [e.data["step"] for e in events(server, job) if e.type == "metrics"]
    assert steps.count(150) == 1 and steps.count(1) == 1
    answer = server.openai().completions.create(model=done.fine_tuned_model, prompt="3:", max_tokens=3)
    assert answer.usage.completion_tokens >= 1


def test_kill_9_of_the_gateway(server):
    job = Job(server, 200)
    engine = server.pid("engine")
    job.until_step(3)
    stream = Stream(server)
    old = server.kill("gateway")
    stream.wait(60)
    assert stream.error is not None and stream.finish is None  # never mistaken for a whole answer
    server.wait_restarted("gateway", old)
    assert server.pid("engine") == engine and alive(engine)
    server.until(lambda: metric(server, "coserve_requests_running") == 0, 30)
    assert job.succeeded().progress["step"] == 200


def test_kill_9_of_the_gateway_right_after_a_create(server):
    job = Job(server, 5)
    old = server.kill("gateway")
    server.wait_restarted("gateway", old)
    assert job.succeeded().trained_tokens > 0


def test_a_stopped_engine_is_seen_and_replaced(server):
    old = server.pid("engine")
    start = time.monotonic()
    server.kill("engine", signal.SIGSTOP)
    server.until(lambda: not server.is_ready(), 30)
    server.wait_restarted("engine", old)
    assert not alive(old) and time.monotonic() - start > 4


def test_a_locked_data_directory_exits_4(server, tiny_model):
    done = subprocess.run(
        [*COSERVE, "serve", "--model", str(tiny_model), "--data-dir", str(server.data_dir), "--port", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 4 and str(server.process.pid) in done.stderr and "--data-dir" in done.stderr
    assert server.is_ready()


def test_kill_9_of_the_supervisor_right_after_a_create(server, tiny_model):
    """Last in this module: it ends the shared server."""
    port, key = int(server.url.rsplit(":", 1)[1]), server.key
    pids = [server.pid("engine"), server.pid("gateway")]
    job = Job(server, 5)
    server.process.kill()
    server.until(lambda: not any(map(alive, pids)), 30)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    with LiveServer(tiny_model, server.data_dir, port=port) as again:
        job.server = again
        assert again.key == key
        assert job.succeeded().trained_tokens > 0
        pids = [again.pid("engine"), again.pid("gateway")]
        assert again.stop() == 0
        assert not any(map(alive, pids))


def events(server: LiveServer, job: Job) -> list:
    return list(server.openai().fine_tuning.jobs.list_events(job.id, limit=100))


def metric(server: LiveServer, name: str) -> float:
    with server.http() as http:
        text = http.get("/metrics").text
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is no metric of: {sorted(set(re.findall(r'^(coserve_[a-z_]+)', text, re.MULTILINE)))}"
    return sum(map(float, found))
