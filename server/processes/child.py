"""One supervised child process: started, listened to, started again with backoff, ended.

It decides nothing about the other child; an exit code that a restart cannot cure is handed to the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coserve.server.wire.lifeline import HEARTBEAT

FATAL_CODES = frozenset({2, 3, 4, 5})  # usage, model refused, data directory, port: the same again after a restart
EXIT_FAILED = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, and counts, that decide about restarts."""

    silence: float = 25.0  # a process that was heard before and is silent for so long is stuck
    first_backoff: float = 0.5
    longest_backoff: float = 15.0
    steady: float = 60.0  # a process that lived so long starts again without delay
    start_attempts: int = 5  # a process that was never heard and ended so many times in a row cannot start


@dataclass(frozen=True, slots=True)
class Program:
    """What to run: descriptors of `pass_fds` reach the process under their numbers."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()


class Child:
    """`keep_running` is the child's life; `terminate` and `kill` end it."""

    def __init__(self, program: Program, timing: Timing, log: logging.Logger) -> None:
        self._program = program
        self._timing = timing
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._unfinished_line = b""
        self._heard_at: float | None = None  # of the current process
        self._ever_heard = False
        self.reason = ""  # the last words of the process that ended last

    @property
    def pid(self) -> int | None:
        """Process id while the process runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def keep_running(self) -> int:
        """Runs the program again and again; returns the exit code once it must not be started any more."""
        name, failures = self._program.name, 0
        while True:
            try:
                lived, code = await self._run_once()
            except OSError as error:  # no memory or no process left: both may come back
                self._log.error("%s cannot be started: %s", name, error.strerror)
                lived, code = 0.0, EXIT_FAILED
            if self._stopping.is_set():
                self._log.info("%s ended (%s)", name, _explain(code))
                return code
            if code in FATAL_CODES:
                self._log.error("%s ended for good (%s)", name, _explain(code))
                return code
            failures = 1 if lived >= self._timing.steady else failures + 1
            if not self._ever_heard and failures >= self._timing.start_attempts:
                self._log.error("%s did not start in %d attempts (%s)", name, failures, _explain(code))
                return EXIT_FAILED
            delay = min(self._timing.first_backoff * 2 ** (failures - 1), self._timing.longest_backoff)
            self._log.error("%s ended (%s); starting it again in %.1f s", name, _explain(code), delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
                return 0  # nothing runs, nothing is lost

    def terminate(self) -> None:
        """Asks the process to end, and starts no other."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process now, and starts no other."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run_once(self) -> tuple[float, int]:
        """Seconds that one process lived, and its exit code (negative: the signal that ended it)."""
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._heard_at, self._unfinished_line, self.reason = None, b"", ""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._program.command,
                env={**self._program.environment, HEARTBEAT: str(write_end)},
                pass_fds=(write_end, *self._program.pass_fds),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,  # our own stdout holds the ready lines and nothing else
                start_new_session=True,  # Ctrl-C at the terminal is for the supervisor, which drains
            )
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        started = loop.time()
        self._log.info("%s started, process %d", self._program.name, self._process.pid)
        if self._stopping.is_set():  # asked to end while the process was being made
            self._signal(signal.SIGTERM)
        loop.add_reader(read_end, self._listen, read_end)
        watchdog = asyncio.create_task(self._watch_silence())
        try:
            code = await self._process.wait()
        finally:
            watchdog.cancel()
            loop.remove_reader(read_end)
            self._listen(read_end)  # what it wrote just before it ended
            os.close(read_end)
        return loop.time() - started, code

    def _listen(self, descriptor: int) -> None:
        """Empty lines are beats, others the reason of the end."""
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        if not data:
            with contextlib.suppress(ValueError):
                asyncio.get_running_loop().remove_reader(descriptor)
            return
        *lines, self._unfinished_line = (self._unfinished_line + data).split(b"\n")
        for line in lines:
            if line:
                self.reason = line.decode("utf-8", "replace")
            else:
                self._heard_at = asyncio.get_running_loop().time()
                self._ever_heard = True

    async def _watch_silence(self) -> None:
        """Kills a process that was heard once and then fell silent: SIGKILL also ends one that is stopped."""
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():  # one that was asked to end has the supervisor's deadline
            await asyncio.sleep(min(1.0, self._timing.silence / 4))
            if self._stopping.is_set() or self._heard_at is None:
                continue
            if loop.time() - self._heard_at > self._timing.silence:
                self._log.error("%s is stuck: silent for %.0f s", self._program.name, loop.time() - self._heard_at)
                self._signal(signal.SIGKILL)
                return


def _explain(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
