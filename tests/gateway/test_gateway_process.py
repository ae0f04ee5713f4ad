"""The gateway as a process: killed, drained, and with an engine that is killed behind it."""

import json
import sqlite3
import threading
import time

import httpx
import pytest
from live_server import LiveServer
from tiny_models import save_tiny_model

pytestmark = pytest.mark.faults

GRACE_SECONDS = 9
LONG = {"model": "tiny", "prompt": "Hello", "max_tokens": 12_000, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama", max_position_embeddings=16384)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    patient = {"COSERVE_ENGINE_PATIENCE_SECONDS": "100"}  # requests wait for the next engine, however slow its start
    data = tmp_path_factory.mktemp("server") / "data"
    with LiveServer(model, data, environment=patient, grace_seconds=GRACE_SECONDS) as server:
        yield server


class Stream(threading.Thread):
    """Reads one stream in the background; `lines` are its data lines, `error` what cut it."""

    def __init__(self, server, **changes):
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.status = 0
        self._server, self._body = server, {**LONG, **changes}
        self.start()

    def run(self):
        try:
            with (
                self._server.http(timeout=150) as http,
                http.stream("POST", "/v1/completions", json=self._body) as answer,
            ):
                self.status = answer.status_code
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.lines.append(line[6:])
        except httpx.HTTPError as error:
            self.error = error

    def wait_tokens(self, count=1, seconds=100):
        self._server.until(lambda: len(self.lines) >= count, seconds)


def ledger(server):
    with sqlite3.connect(f"file:{server.data_dir}/coserve.db?mode=ro", uri=True) as connection:
        return connection.execute("SELECT request_id, prompt_tokens, completion_tokens FROM usage_ledger").fetchall()


def running(server):
    with server.http() as http:
        text = http.get("/metrics").text
    found = [line for line in text.splitlines() if line.startswith("coserve_requests_running")]
    return float(found[0].split()[1]) if found else None


def test_an_engine_that_is_killed(server):
    """Started streams say so; what was queued is answered by the next engine."""
    stream = Stream(server)
    stream.wait_tokens()
    old = server.kill("engine")
    queued = Stream(server, max_tokens=5)  # comes while nobody is there
    stream.join(100)
    assert json.loads(stream.lines[-1])["error"]["code"] == "engine_restarted"
    server.wait_restarted("engine", old)
    queued.join(100)
    assert queued.lines[-1] == "[DONE]", queued.lines


def test_a_gateway_that_is_killed(server):
    """Its streams break; the engine drops them; what they had used is in the ledger; nothing else is lost."""
    engine = server.pid("engine")
    stream = Stream(server)
    stream.wait_tokens()
    request_id = json.loads(stream.lines[0])["id"]
    server.until(lambda: any(row[0] == request_id and row[2] > 0 for row in ledger(server)))
    old = server.kill("gateway")
    stream.join(100)
    assert stream.error is not None
    server.wait_restarted("gateway", old)
    assert server.pid("engine") == engine
    server.until(lambda: running(server) == 0, 30)
    written = {row[0]: row[1:] for row in ledger(server)}
    assert written[request_id][0] == 2 and written[request_id][1] > 0
    after = Stream(server, max_tokens=5)
    after.join(100)
    assert after.lines[-1] == "[DONE]"


def test_sigterm_refuses_what_is_new_and_ends_what_takes_too_long_with_an_error(server):
    """Last in this module: it ends the shared server."""
    stream = Stream(server)
    stream.wait_tokens()
    codes: list[int] = []
    stopping = threading.Thread(target=lambda: codes.append(server.stop()), daemon=True)
    started = time.monotonic()
    stopping.start()
    with server.http() as http:
        server.until(lambda: http.get("/readyz").json().get("error", {}).get("code") == "draining", 30)
        refused = http.post("/v1/completions", json={**LONG, "stream": False})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert http.get("/healthz").status_code == 200
    stopping.join(100)
    assert codes == [0], server.log()
    assert time.monotonic() - started < GRACE_SECONDS + 20
    stream.join(60)
    assert json.loads(stream.lines[-1]).get("error", {}).get("code") == "draining", (stream.error, server.log())
    request_id = json.loads(stream.lines[0])["id"]
    assert any(row[0] == request_id for row in ledger(server))
