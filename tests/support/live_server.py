"""A whole server as a user starts it: `coserve serve` with its supervisor, gateway and engine. For tests only."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

COSERVE = (sys.executable, "-P", "-m", "coserve.server.cli")
READY_SECONDS = 150


class LiveServer:
    """Context manager. `options` are those of `coserve serve`, with underscores; `environment` is added to ours."""

    def __init__(self, model: Path | str, data_dir: Path, *, environment: dict[str, str] | None = None, **options: Any):
        values = {"port": 0, "dtype": "float32", "threads": 1, **options}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        self.command = [*COSERVE, "serve", f"--model={model}", f"--data-dir={data_dir}", *arguments]
        self.environment = {**os.environ, **(environment or {})}
        self.data_dir = data_dir
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the server
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self.ready_lines: list[str] = []

    def __enter__(self) -> LiveServer:
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def launch(self) -> None:
        """Starts the supervisor and returns at once."""
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
            text=True,
        )  # fmt: skip

    def wait_ready(self) -> None:
        watchdog = threading.Timer(READY_SECONDS, self.process.kill)
        watchdog.start()
        try:
            self.ready_lines = [self.process.stdout.readline(), self.process.stdout.readline()]
        finally:
            watchdog.cancel()
        found = re.search(r"OPENAI_BASE_URL=(\S+)/v1", self.ready_lines[1])
        assert found, f"the server did not start:\n{self.log()}"
        self.url = found[1]

    @property
    def key(self) -> str:
        return (self.data_dir / "admin-key").read_text().strip()

    @property
    def client_environment(self) -> dict[str, str]:
        return {**os.environ, "COSERVE_BASE_URL": self.url, "COSERVE_API_KEY": self.key}

    def http(self, key: str | None = None, timeout: float = 100.0) -> httpx.Client:
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    def openai(self, key: str | None = None, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, **options)

    def log(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def pid(self, name: str) -> int:
        """Process id of the newest engine or gateway."""
        return int(re.findall(rf"{name} started, process (\d+)", self.log())[-1])

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def wait_restarted(self, name: str, old: int, seconds: float = 100) -> None:
        """Until another process of that name runs and the server is ready again."""
        self.until(lambda: self.pid(name) != old, seconds)
        self.until(self.is_ready, seconds)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
        return False

    def until(self, condition: Any, seconds: float = 100) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return value

    def stop(self, seconds: float = 150) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def close(self) -> None:
        """Ends whatever still runs of it; its children end by themselves when it is gone."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(15)
                except subprocess.TimeoutExpired:
                    self.process.kill()
            self.process.wait()
            self.process.stdout.close()
        self._log.close()

    def cli(self, *arguments: str, key: str | None = None, stdin: str = "", timeout: float = 120) -> Any:
        """Runs `coserve …` against this server; the completed process with its output."""
        environment = self.client_environment | ({"COSERVE_API_KEY": key} if key else {})
        return subprocess.run(
            [*COSERVE, *arguments], env=environment, input=stdin, capture_output=True, text=True, timeout=timeout
        )


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
