"""Starts the engine and the gateway, keeps them running, and ends them in order. Imports no model library.

It owns what must outlive a crash of either: the data directory's lock, the listening port and the run directory with
the settings and the engine's socket. If it is killed itself, its children notice and end: nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coserve.server.config import Settings, write_process_settings
from coserve.server.processes.child import EXIT_FAILED, Child, Program, Timing
from coserve.server.processes.preflight import (
    EXIT_DATA_DIRECTORY,
    CannotStart,
    make_run_directory,
    open_listener,
    reachable_url,
    resolve_model,
    socket_path,
    take_data_directory,
)
from coserve.server.store.errors import StoreError
from coserve.server.tenancy.admin_key import load_admin_key
from coserve.server.wire.lifeline import LIFELINE, LISTENER

ENGINE = (sys.executable, "-P", "-m", "coserve.server.engine")
GATEWAY = (sys.executable, "-P", "-m", "coserve.server.gateway")

EXIT_DRAINED = 0
GATEWAY_SHARE = 0.6  # of the grace period: streams finish first, then the engine saves its jobs
_ORDERLY = frozenset({0, -signal.SIGTERM})  # the signal's own: it was still starting, with nothing to save
_FATAL_SECONDS = 5.0  # for the other process, when one ended for good
_PROBE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Server:
    """What is taken before the processes start, and given back after they ended."""

    settings: Settings
    url: str
    admin_key: str
    admin_key_file: Path
    listener: socket.socket
    lock: int
    run: Path
    run_note: Path

    def close(self) -> None:
        self.listener.close()
        shutil.rmtree(self.run, ignore_errors=True)
        self.run_note.unlink(missing_ok=True)
        os.close(self.lock)


def prepare(settings: Settings) -> Server:
    """Checks and takes everything a server needs. Raises CannotStart with the exit code and a remedy."""
    settings = settings.model_copy(update={"model": resolve_model(settings.model)})
    directory, lock = take_data_directory(settings.data_dir)
    listener = None
    try:
        listener = open_listener(settings.host, settings.port)
        try:
            admin_key = load_admin_key(directory.admin_key)
        except StoreError as error:
            raise CannotStart(EXIT_DATA_DIRECTORY, str(error)) from None
        run_note = directory.root / "run"
        run = make_run_directory(run_note)
    except BaseException:
        directory.unlock()
        if listener is not None:
            listener.close()
        raise
    resolved = settings.model_copy(update={"data_dir": directory.root, "port": listener.getsockname()[1]})
    # each child's own share: the whole of the shutdown stays inside the operator's number
    theirs = resolved.model_copy(update={"grace_seconds": settings.grace_seconds * GATEWAY_SHARE})
    write_process_settings(run / "settings.json", theirs, socket_path(run))
    return Server(resolved, reachable_url(listener), admin_key, directory.admin_key, listener, lock, run, run_note)


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment of both children; what the user has set stands."""
    environment = dict(os.environ)
    # OpenMP threads spin at a barrier for about a tenth of a millisecond, not for three as by default; the engine
    # makes it shorter still while others want the cores (server/engine/cores.py)
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    # Large tensors stay in the heap instead of being mapped, zeroed and given back at every use: 8% of a training
    # step on two cores, a third of its page faults.
    environment.setdefault("MALLOC_MMAP_MAX_", "0")
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 * 2**30))
    # Weights lie in pages of 2 MiB where the kernel gives them on request: decode steps are about 5% quicker.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


class Supervisor:
    """Runs one prepared server until a signal or a failure that no restart cures; `run` returns the exit code."""

    def __init__(
        self,
        server: Server,
        *,
        engine: tuple[str, ...] = ENGINE,
        gateway: tuple[str, ...] = GATEWAY,
        timing: Timing | None = None,
        announce: Callable[[str], None] = print,
        log: logging.Logger | None = None,
    ) -> None:
        self._server = server
        self._announce = announce
        self._log = log or logging.getLogger("coserve.supervisor")
        timing = timing or Timing(silence=server.settings.engine_silence_seconds * 1.25)
        # the pipe's write end is ours alone: when we are gone, however it came about, the children read its end
        self._lifeline_read, self._lifeline_write = os.pipe()
        base = {**child_environment(server.settings), LIFELINE: str(self._lifeline_read)}
        inherited = (self._lifeline_read, server.lock)
        listener = server.listener.fileno()
        arguments = ("--settings", str(server.run / "settings.json"))
        self._engine = Child(Program("engine", (*engine, *arguments), base, inherited), timing, self._log)
        self._gateway = Child(
            Program("gateway", (*gateway, *arguments), {**base, LISTENER: str(listener)}, (*inherited, listener)),
            timing,
            self._log,
        )
        self._signals = 0
        self._signalled = asyncio.Event()
        self._signalled_again = asyncio.Event()

    async def run(self) -> int:
        """0 after an orderly end inside the grace period, 1 if something had to be killed, else a child's code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        engine = asyncio.create_task(self._engine.keep_running())
        gateway = asyncio.create_task(self._gateway.keep_running())
        ready = asyncio.create_task(self._announce_ready())
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            await asyncio.wait({engine, gateway, signalled}, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if self._signalled.is_set():
                return await self._drain(engine, gateway)
            return await self._give_up(engine, gateway)
        finally:
            self._engine.kill()
            self._gateway.kill()
            for task in (ready, signalled):
                task.cancel()
            await asyncio.gather(engine, gateway, ready, signalled, return_exceptions=True)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            os.close(self._lifeline_write)
            os.close(self._lifeline_read)

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals == 1:
            seconds = self._server.settings.grace_seconds
            self._log.info("%s: draining, at most %.0f s; once more to stop now", signal.Signals(number).name, seconds)
            self._signalled.set()
        else:
            self._signalled_again.set()

    async def _drain(self, engine: asyncio.Task[int], gateway: asyncio.Task[int]) -> int:
        """Gateway first, so that streams end well, then the engine, which saves its jobs."""
        grace = self._server.settings.grace_seconds
        end = asyncio.get_running_loop().time() + grace
        self._server.listener.close()  # the gateway's own copy decides from now on who is let in
        self._gateway.terminate()
        # a little more than the gateway was told: it ends by itself, and says so to its streams
        drained = await self._ended(gateway, grace * GATEWAY_SHARE + grace * 0.1)
        if not drained:
            self._log.error("the gateway did not end in time, it is killed")
            self._gateway.kill()
        self._engine.terminate()
        saved = await self._ended(engine, end - asyncio.get_running_loop().time())
        if not saved:
            self._log.error("the engine did not end in time, it is killed; its jobs go on from their last checkpoint")
            self._engine.kill()
        in_order = drained and saved and all(task.result() in _ORDERLY for task in (engine, gateway))
        return EXIT_DRAINED if in_order else EXIT_FAILED

    async def _give_up(self, engine: asyncio.Task[int], gateway: asyncio.Task[int]) -> int:
        """One child ended for good: the other has no use."""
        child, task = (self._engine, engine) if engine.done() else (self._gateway, gateway)
        self._server.listener.close()
        self._engine.terminate()
        self._gateway.terminate()
        await asyncio.wait({engine, gateway}, timeout=_FATAL_SECONDS)
        if child.reason:
            print(f"coserve: {child.reason}", file=sys.stderr, flush=True)
        return task.result()

    async def _ended(self, task: asyncio.Task[int], seconds: float) -> bool:
        again = asyncio.create_task(self._signalled_again.wait())
        await asyncio.wait({task, again}, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        return task.done()

    async def _announce_ready(self) -> None:
        host, port = self._server.listener.getsockname()[:2]
        while not await asyncio.to_thread(_is_ready, host, port):
            await asyncio.sleep(_PROBE_SECONDS)
        self._announce(ready_lines(self._server, show_key=sys.stdout.isatty()))


def _is_ready(host: str, port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=2.0)) as connection:
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def ready_lines(server: Server, *, show_key: bool) -> str:
    """What to type next. The key itself goes to a terminal only: elsewhere it would stay in a log file."""
    key = server.admin_key if show_key else f'"$(cat {shlex.quote(str(server.admin_key_file))})"'
    return (
        f"coserve is ready: {server.settings.base_model_id} at {server.url}\n"
        f"export OPENAI_BASE_URL={server.url}/v1 OPENAI_API_KEY={key}"
    )


def serve(settings: Settings) -> int:
    """The whole of `coserve serve` once its settings are resolved; returns the exit code."""
    log_to_stderr(settings.log_level)
    try:
        server = prepare(settings)
    except CannotStart as error:
        print(f"coserve: {error}", file=sys.stderr)
        return error.code
    try:
        return asyncio.run(_run(server))
    finally:
        server.close()


async def _run(server: Server) -> int:
    return await Supervisor(server, announce=lambda text: print(text, flush=True)).run()


def log_to_stderr(level: str) -> None:
    """One line an event, on stderr."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
