"""A real supervisor process over two tiny real children, for tests of supervision alone."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNNER = """
import asyncio, logging, sys
from coserve.server.config import resolve_settings
from coserve.server.processes.child import Timing
from coserve.server.processes.preflight import CannotStart
from coserve.server import supervisor
given = dict(model="org/none", data_dir=sys.argv[1], port=int(sys.argv[2]), grace_seconds=float(sys.argv[5]))
settings = resolve_settings(given, environ={})
supervisor.log_to_stderr("info")
try:
    server = supervisor.prepare(settings)
except CannotStart as error:
    print(error, file=sys.stderr)
    sys.exit(error.code)
async def run():
    return await supervisor.Supervisor(
        server, engine=(sys.executable, "-P", sys.argv[3]), gateway=(sys.executable, "-P", sys.argv[4]),
        timing=Timing(silence=float(sys.argv[6]), first_backoff=0.05, longest_backoff=0.2, start_attempts=4),
        announce=lambda text: print(text, flush=True),
    ).run()
code = asyncio.run(run())
server.close()
sys.exit(code)
"""

# Every child notes its events in `<data dir>/events`; its first lines are what a real child's main does.
CHILD = """
import os, signal, sys, time, json
from coserve.server.wire.lifeline import start_heartbeat, watch_lifeline, inherited_listener
watch_lifeline()
heartbeat = start_heartbeat()
settings = json.load(open(sys.argv[-1]))
def note(event):
    descriptor = os.open(settings["data_dir"] + "/events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{NAME} {event} {os.getpid()}\\n".encode())
    os.close(descriptor)
def on_term(*_):
    note("term"); time.sleep(DRAIN); note("end"); os._exit(0)
signal.signal(signal.SIGTERM, on_term)
note("start")
"""

ENGINE = CHILD + "while True:\n    heartbeat.beat(); time.sleep(0.02)\n"

GATEWAY = (
    CHILD
    + """
import http.server, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = inherited_listener()
server.timeout = 0.05
while True:
    heartbeat.beat(); server.handle_request()
"""
)


class Running:
    """One supervisor with its children, and what is known of them from outside.

    It waits long before it calls a child stuck or ends one that drains, but where a test is about that: a child that
    gets no core for two seconds is neither.
    """

    def __init__(
        self, folder: Path, engine: str, gateway: str, port: int = 0, drain: float = 0.0, grace: float = 40.0,
        silence: float = 30.0,
    ) -> None:  # fmt: skip
        self.data = folder / "data"
        tmp = folder / "t"
        tmp.mkdir(exist_ok=True)
        self.tmp = tmp
        scripts = []
        for name, text in (("engine", engine), ("gateway", gateway)):
            script = folder / f"{name}.py"
            script.write_text(f"NAME, DRAIN = {name!r}, {drain}\n{text}")
            scripts.append(str(script))
        self.err = folder / "stderr"
        with self.err.open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", RUNNER, str(self.data), str(port), *scripts, str(grace),
                 str(silence)],
                stdout=subprocess.PIPE, stderr=err, text=True, env={**os.environ, "TMPDIR": str(tmp)},
                start_new_session=True,  # a terminal's Ctrl-C goes to a group: here to this one
            )  # fmt: skip

    def wait_ready(self) -> str:
        self.process.stdout.readline()
        export = self.process.stdout.readline()
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", export)[1])
        self.until(lambda: self.events("engine", "start"))
        return export

    def events(self, name: str = "", event: str = "") -> list[tuple[str, str, int]]:
        with contextlib.suppress(FileNotFoundError):
            lines = [line.split() for line in (self.data / "events").read_text().splitlines()]
            return [(n, e, int(p)) for n, e, p in lines if name in ("", n) and event in ("", e)]
        return []

    def pid(self, name: str) -> int:
        return self.events(name, "start")[-1][2]

    def until(self, condition, seconds: float = 60.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)
        return value

    def get(self) -> int:
        """The pid of the gateway that answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/readyz")
        return int(connection.getresponse().read())

    def exit_code(self, seconds: float = 60.0) -> int:
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        for _, _, pid in self.events(event="start"):
            with contextlib.suppress(ProcessLookupError):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(*, engine: str = ENGINE, gateway: str = GATEWAY, **options) -> Running:
        running = Running(tmp_path, engine, gateway, **options)
        started.append(running)
        return running

    start.child, start.engine, start.gateway, start.alive = CHILD, ENGINE, GATEWAY, alive
    yield start
    for running in started:
        running.close()
