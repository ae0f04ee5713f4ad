"""`python -P -m coserve.server.gateway --settings FILE`: the HTTP process, started by the supervisor.

Exit codes: 0 drained, 1 a failure that a restart may cure, 3 the model's tokenizer was refused, 4 the data directory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from coserve.server.wire.lifeline import Heartbeat, inherited_listener, start_heartbeat, watch_lifeline

_SPARE_DESCRIPTORS = 128  # for files, the database, the engine's socket
_LAST_SECONDS = 1.0  # for answers that are being written when everything else is over

EXIT_MODEL, EXIT_DATA_DIRECTORY = 3, 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="coserve.server.gateway")
    parser.add_argument("--settings", type=Path, required=True, help="the settings file the supervisor has written")
    arguments = parser.parse_args()
    watch_lifeline()
    heartbeat = start_heartbeat()

    from coserve.server.config import read_process_settings
    from coserve.server.data.chat_template import ChatTemplateError
    from coserve.server.data.tokenizer_files import TokenizerError
    from coserve.server.store.errors import StoreError

    settings, socket_path = read_process_settings(arguments.settings)
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s gateway %(levelname)s %(name)s: %(message)s",
    )
    try:
        asyncio.run(_serve(settings, socket_path, heartbeat))
    except (TokenizerError, ChatTemplateError) as error:
        heartbeat.last_words(str(error))
        print(f"model refused: {error}", file=sys.stderr)
        return EXIT_MODEL
    except StoreError as error:
        heartbeat.last_words(str(error))
        print(f"data directory: {error}", file=sys.stderr)
        return EXIT_DATA_DIRECTORY
    return 0


async def _serve(settings, socket_path: str, heartbeat: Heartbeat) -> None:  # type: ignore[no-untyped-def]
    import uvicorn

    from coserve.server.api.connection import limited
    from coserve.server.app import create_app
    from coserve.server.gateway.assembly import assemble, drain

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are ours: draining comes before uvicorn's own shutdown."""
            yield

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async with AsyncExitStack() as leave:
        beating = asyncio.create_task(heartbeat.keep_beating())
        leave.callback(beating.cancel)
        services = await assemble(settings, socket_path, leave)
        protocol = limited(
            stream_buffer=settings.stream_buffer,
            stall_seconds=settings.stream_stall_seconds,
            max_connections=_raise_descriptor_limit() - _SPARE_DESCRIPTORS,
        )
        config = uvicorn.Config(
            create_app(services),
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # ours says less: no query, no client address
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(_LAST_SECONDS) or 1,
            h11_max_incomplete_event_size=settings.max_header * 2,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of what a client is told anyway
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[_listener(settings.host, settings.port)]))
        stopping = asyncio.create_task(stop.wait())
        refused = asyncio.create_task(services.engine.until_refused())
        leave.callback(refused.cancel)
        await asyncio.wait((serving, stopping, refused), return_when=asyncio.FIRST_COMPLETED)
        if refused.done() or not serving.done():
            # nothing runs on an engine that was refused: there is nothing to wait for
            await drain(services, 0.0 if refused.done() else max(settings.grace_seconds - _LAST_SECONDS, 0.0))
            server.should_exit = True
        await serving
        if refused.done():
            await refused


def _listener(host: str, port: int) -> socket.socket:
    """The supervisor's listening socket; without a supervisor, one of our own."""
    inherited = inherited_listener()
    if inherited is not None:
        return inherited
    listener = socket.create_server((host, port), backlog=2048, reuse_port=False)
    listener.setblocking(False)
    return listener


def _raise_descriptor_limit() -> int:
    """As many open descriptors as this process may have: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, 65536)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


if __name__ == "__main__":
    sys.exit(main())
