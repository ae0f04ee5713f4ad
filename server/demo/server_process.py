"""A `coserve serve` of the show's own: started as a child, waited for, and stopped whatever happens.

The child gets a session of its own, so that Ctrl-C reaches the show alone, which then ends the server in order.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_READY = re.compile(r"coserve is ready: (?P<model>.+) at (?P<url>http://\S+)")
_KEPT_LINES = 40
_GRACE_SECONDS = 20.0


class ServerFailed(Exception):
    """The server did not start or ended early; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Running:
    """Where the server answers, the base model's id, and the key that may ask for everything."""

    url: str
    model: str
    admin_key: str


class ServerProcess:
    """`async with ServerProcess(…) as running`: ready on entry, gone on exit; `exit_code` tells how it went."""

    def __init__(self, model: str, data_dir: Path, *, ready_seconds: float = 300.0, options: tuple[str, ...] = ()):
        self._command = (
            sys.executable, "-P", "-m", "coserve.server.cli", "serve", "--model", model, "--data-dir", str(data_dir),
            "--port", "0", "--grace-seconds", str(_GRACE_SECONDS), *options,
        )  # fmt: skip
        self._data_dir = data_dir
        self._ready_seconds = ready_seconds
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready: asyncio.Future[tuple[str, str]] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.exit_code: int | None = None

    async def __aenter__(self) -> Running:
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read())
        try:
            model, url = await asyncio.wait_for(self._ready, self._ready_seconds)
            admin_key = (self._data_dir / "admin-key").read_text("ascii").strip()
        except TimeoutError:
            await self._stop()
            raise self._failed(f"The server was not ready after {self._ready_seconds:.0f} s") from None
        except BaseException:
            await self._stop()
            raise
        return Running(url, model, admin_key)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The end of the server's log."""
        return tuple(self._lines)

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None and self._ready is not None
        async for raw in self._process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            self._lines.append(line)
            match = _READY.search(line)
            if match and not self._ready.done():
                self._ready.set_result((match["model"], match["url"]))
        code = await self._process.wait()
        if not self._ready.done():
            self._ready.set_exception(self._failed(f"The server ended before it was ready (exit code {code})"))

    async def _stop(self) -> None:
        """SIGTERM, and SIGKILL if the server outlives its own grace period. Idempotent."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), _GRACE_SECONDS + 10)
            except TimeoutError:
                process.kill()  # its children notice and end too
                await process.wait()
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=5)
            self._reader.cancel()
        self.exit_code = process.returncode

    def _failed(self, text: str) -> ServerFailed:
        return ServerFailed("\n  ".join([f"{text}. Its last words:", *self._lines]))
