"""What is checked, and taken, before any process starts: the model's folder, the data directory, the port, a place
for the socket. Every failure is one `CannotStart` with its exit code and a remedy.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from coserve.server.store.datadir import DataDirectory, DataDirectoryError, DataDirectoryLocked

EXIT_USAGE, EXIT_MODEL, EXIT_DATA_DIRECTORY, EXIT_PORT = 2, 3, 4, 5

_SOCKET_NAME = "engine.sock"
_LONGEST_SOCKET_PATH = 107
_ORPHAN_SECONDS = 10.0  # children of a supervisor that was killed take a moment to notice


class CannotStart(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def resolve_model(model: str) -> str:
    """An absolute folder, or a hub id as it is. Raises CannotStart for a path that holds no model.

    The engine checks all of the model; this finds in a millisecond what would else take a start to find.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _check_model_folder(path)
        return os.path.abspath(path)
    if path.exists():
        raise CannotStart(EXIT_MODEL, f"{path} is a file: give the folder of a model, in safetensors format")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CannotStart(EXIT_MODEL, f"there is no folder {path}: check --model, or give a hub id like org/name")
    return model


def _check_model_folder(path: Path) -> None:
    remedy = "give a folder with config.json, *.safetensors and a tokenizer"
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise CannotStart(EXIT_MODEL, f"{path} holds no config.json: {remedy}") from None
    except OSError as error:
        raise CannotStart(EXIT_MODEL, f"{path / 'config.json'} cannot be read ({error.strerror})") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CannotStart(EXIT_MODEL, f"{path / 'config.json'} is damaged: copy the model again")
    if not any(path.glob("*.safetensors")):
        raise CannotStart(EXIT_MODEL, f"{path} holds no *.safetensors, the only weights that are read: {remedy}")


def take_data_directory(root: Path) -> tuple[DataDirectory, int]:
    """The prepared data directory and the descriptor of its lock. Raises CannotStart."""
    directory = DataDirectory(root)
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            lock = directory.lock()
            directory.prepare()
            return directory, lock
        except DataDirectoryLocked as error:
            if time.monotonic() > deadline or _holder_lives(directory.root / "lock"):
                raise CannotStart(EXIT_DATA_DIRECTORY, str(error)) from None
            time.sleep(0.1)
        except DataDirectoryError as error:
            directory.unlock()
            raise CannotStart(EXIT_DATA_DIRECTORY, str(error)) from None


def _holder_lives(lock: Path) -> bool:
    """Whether the supervisor that took the lock still runs; if not, only children of it hold on, and not for long."""
    try:
        pid = int(lock.read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, IndexError):
        return True
    return state not in ("Z", "X")  # ended, and only not yet collected by whoever started it


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises CannotStart."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise CannotStart(EXIT_USAGE, f"--host {host} is no address of this machine ({error.strerror})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            what = (
                "is taken by another program" if error.errno == errno.EADDRINUSE else "needs more rights than we have"
            )
            raise CannotStart(EXIT_PORT, f"port {port} of {host} {what}: give another --port") from None
        raise CannotStart(EXIT_USAGE, f"cannot listen on {host}:{port} ({error.strerror}): check --host") from None
    listener.setblocking(False)
    return listener


def reachable_url(listener: socket.socket) -> str:
    """Where a client on this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_run_directory(note: Path) -> Path:
    """A fresh 0700 folder with a path short enough for a unix socket; removes that of a server that was killed.

    `note` is a file of the data directory that remembers the folder.
    """
    _remove_earlier(note)
    for parent in (None, "/tmp"):  # None: TMPDIR and the like
        run = Path(tempfile.mkdtemp(prefix="coserve-", dir=parent))
        if len(os.fsencode(str(run / _SOCKET_NAME))) <= _LONGEST_SOCKET_PATH:
            note.write_text(str(run))
            return run
        run.rmdir()
    raise CannotStart(EXIT_USAGE, f"{tempfile.gettempdir()} is too long for a unix socket: set TMPDIR to a shorter one")


def socket_path(run: Path) -> str:
    return str(run / _SOCKET_NAME)


def _remove_earlier(note: Path) -> None:
    try:
        run = Path(note.read_text())
        ours = run.name.startswith("coserve-") and not run.is_symlink() and run.stat().st_uid == os.getuid()
    except (OSError, ValueError):
        return  # the usual case: the last server removed its folder and its note
    if ours:
        shutil.rmtree(run, ignore_errors=True)
