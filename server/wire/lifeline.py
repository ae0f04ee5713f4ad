"""What a child process keeps with its supervisor: it ends when the supervisor does, and shows that it is not stuck.

Three descriptors come by the environment; a process started by hand has none of them and runs unsupervised. Nothing
here imports more than the standard library: it is called before anything slow is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time

LIFELINE = "COSERVE_LIFELINE_FD"  # read end of a pipe whose only write end is the supervisor's
HEARTBEAT = "COSERVE_HEARTBEAT_FD"  # write end of a pipe that the supervisor reads
LISTENER = "COSERVE_LISTEN_FD"  # the bound and listening TCP socket, gateway only

EXIT_ORPHANED = 70
_BEAT_SECONDS = 1.0


def watch_lifeline() -> None:
    """Ends this process, at once and without cleaning up, when the supervisor is gone. Call first thing in main.

    Everything that was acknowledged is on disk already, and an orphan would keep the port and the data directory.
    """
    descriptor = _take(LIFELINE)
    if descriptor is None:
        return

    def wait_for_the_end() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=wait_for_the_end, name="coserve-lifeline", daemon=True).start()


class Heartbeat:
    """Signs of life. The first one tells the supervisor that starting is over: from then on silence means stuck."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._last = float("-inf")
        if descriptor is not None:
            os.set_blocking(descriptor, False)

    def beat(self) -> None:
        """Call it at every turn of the loop whose progress matters; it writes at most once a second (else 50 ns)."""
        now = time.monotonic()
        if now - self._last >= _BEAT_SECONDS:
            self._last = now
            self._write(b"\n")

    def last_words(self, reason: str) -> None:
        """Tells the supervisor, in one line, why this process is about to end with a code other than 0."""
        self._write(b" ".join(reason.encode("utf-8", "replace").split())[:2000] + b"\n")

    async def keep_beating(self) -> None:
        """For a process whose progress is its event loop's: a task that beats until it is cancelled."""
        while True:
            self.beat()
            await asyncio.sleep(_BEAT_SECONDS)

    def _write(self, line: bytes) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the supervisor is slow, or gone
                os.write(self._descriptor, line)


def start_heartbeat() -> Heartbeat:
    """The heartbeat to this process's supervisor; one that does nothing if there is none."""
    return Heartbeat(_take(HEARTBEAT))


def inherited_listener() -> socket.socket | None:
    """The listening socket that the supervisor opened, so that the port stays taken while a gateway restarts."""
    descriptor = _take(LISTENER)
    return None if descriptor is None else socket.socket(fileno=descriptor)


def _take(variable: str) -> int | None:
    """A descriptor named by the environment, hidden from processes that this one may start."""
    value = os.environ.pop(variable, None)
    if value is None:
        return None
    descriptor = int(value)
    os.set_inheritable(descriptor, False)
    return descriptor
