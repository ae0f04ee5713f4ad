"""The engine's end of the socket: listens, and hands whole messages to a loop that must never block.

One thread does all waiting on sockets. There is one gateway at a time; a new connection replaces the old one. The
engine's loop calls `poll`, `wait` and `send` from one thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from coserve.server.wire.codec import HEADER_BYTES, WireError, decode, encode, frame_length
from coserve.server.wire.messages import Generate

MAX_UNSENT_BYTES = 64 * 1024 * 1024  # a gateway this far behind is not reading: it is disconnected
_READ_BYTES = 1 << 18
_LONGEST_PATH = 107  # sockaddr_un on Linux, without the closing zero byte


@dataclass(frozen=True, slots=True)
class Connected:
    """A gateway has connected. Messages sent from now on, and only those, go to it."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The gateway is gone: it closed, was replaced, did not read, or sent bytes that are no message."""

    reason: str


class _Connection:
    """One accepted socket: bytes read and not yet a message, frames not yet sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.incoming = bytearray()
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.open = True

    def take_frames(self) -> list[Any]:
        """Whole messages out of `incoming`. Raises WireError at the first frame that is none."""
        found, start, end = [], 0, len(self.incoming)
        while end - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            length = frame_length(self.incoming[start:body])
            if end - body < length:
                break
            found.append(decode(bytes(self.incoming[body : body + length])))
            start = body + length
        if start:
            del self.incoming[:start]
        return found

    def flush(self) -> None:
        """Sends what the kernel takes now. Raises OSError when the other end is gone."""
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent[0])
            except (BlockingIOError, InterruptedError):
                return
            self.unsent_bytes -= sent
            if sent == len(self.unsent[0]):
                self.unsent.popleft()
            else:
                self.unsent[0] = self.unsent[0][sent:]


class EngineSocket:
    """Listens on the unix socket `path`. `start` before anything else, `close` at the end."""

    def __init__(self, path: str, *, max_unsent_bytes: int = MAX_UNSENT_BYTES) -> None:
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise ValueError(
                f"the socket path {path!r} is longer than {_LONGEST_PATH} bytes; set TMPDIR to a shorter directory"
            )
        self._path = path
        self._max_unsent_bytes = max_unsent_bytes
        self._news = threading.Condition()  # guards everything below it
        self._inbox: deque[tuple[Any, _Connection]] = deque()
        self._current: _Connection | None = None  # what the thread reads from
        self._greeted: _Connection | None = None  # whose Connected has been polled: where `send` goes
        self._closing = False
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    # ------------------------------------------------------------- for the engine's loop

    def start(self) -> None:
        """Binds and listens. A socket file left by an engine that died is replaced; any other file is an error."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self._path).st_mode):
                raise FileExistsError(f"{self._path} exists and is not a socket")
            os.unlink(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._path)
        os.chmod(self._path, 0o600)
        listener.listen(4)
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="coserve-wire", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether `send` reaches a gateway."""
        greeted = self._greeted
        return greeted is not None and greeted.open

    def poll(self) -> list[Any]:
        """All messages since the last poll, in order, `Connected` and `Disconnected` among them. Never blocks."""
        if not self._inbox:
            self._check_thread()
            return []
        with self._news:
            items = list(self._inbox)
            self._inbox.clear()
            for message, connection in items:
                if type(message) is Connected:
                    self._greeted = connection
        return [message for message, _ in items]

    def wait(self, timeout: float) -> bool:
        """Blocks until there is something to poll, at most `timeout` seconds. Whether there is."""
        self._check_thread()
        with self._news:
            return self._news.wait_for(lambda: bool(self._inbox) or self._closing, timeout) and bool(self._inbox)

    @property
    def asked(self) -> bool:
        """Whether a request waits to be polled."""
        if not self._inbox:
            return False
        with self._news:
            return any(isinstance(message, Generate) for message, _ in self._inbox)

    def send(self, message: Any) -> bool:
        """Hands one message to the gateway that was last polled as Connected. Never blocks.

        False: there is none any more, the message is dropped. Raises WireError if the message cannot be encoded.
        """
        frame = encode(message)
        with self._news:
            connection = self._greeted
            if connection is None or not connection.open:
                return False
            if connection.unsent_bytes + len(frame) > self._max_unsent_bytes:
                self._drop(connection, f"it left {connection.unsent_bytes} bytes unread")
                return False
            idle = not connection.unsent
            connection.unsent.append(memoryview(frame))
            connection.unsent_bytes += len(frame)
            if not idle:
                return True  # the thread is already waiting for the socket to take more
            try:
                connection.flush()  # the usual case: the kernel takes it at once and no thread has to wake
            except OSError as error:
                self._drop(connection, f"sending failed: {error.strerror}")
                return False
            if connection.unsent:
                self._wake()
            return True

    def close(self) -> None:
        """Ends the connection and the thread, and removes the socket file. Calling it again does nothing."""
        with self._news:
            if self._closing:
                return
            self._closing = True
            self._news.notify_all()
        self._wake()
        if self._thread is not None:
            self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # ------------------------------------------------------------- the thread

    def _run(self) -> None:
        listener = self._listener
        while True:
            events = self._selector.select()
            with self._news:
                if self._closing:
                    break
            for key, mask in events:
                if key.fileobj is listener:
                    self._accept()
                elif key.fileobj == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                elif key.data is not None:
                    self._serve(key.data, mask)
            self._watch()
        with self._news:
            if self._current is not None:
                self._drop(self._current, "the engine closes")
            self._watch()
        if listener is not None:
            listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()  # type: ignore[union-attr]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            time.sleep(0.05)  # out of descriptors: the connection stays queued, do not spin on it
            return
        sock.setblocking(False)
        connection = _Connection(sock)
        with self._news:
            if self._current is not None:
                self._drop(self._current, "a new gateway has connected")
            self._current = connection
            self._inbox.append((Connected(), connection))
            self._news.notify_all()
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection, mask: int) -> None:
        if not connection.open:
            return
        reason, found = None, []
        try:
            if mask & selectors.EVENT_READ:
                chunk = connection.sock.recv(_READ_BYTES)
                if chunk:
                    connection.incoming += chunk
                    found = connection.take_frames()
                else:
                    reason = "it closed the connection"
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            reason = f"reading failed: {error.strerror}"
        except WireError as error:
            reason = f"it broke the protocol: {error}"
        with self._news:
            if not connection.open:
                return
            if found:
                self._inbox.extend((message, connection) for message in found)
                self._news.notify_all()
            if reason is None and mask & selectors.EVENT_WRITE:
                try:
                    connection.flush()
                except OSError as error:
                    reason = f"sending failed: {error.strerror}"
            if reason is not None:
                self._drop(connection, reason)

    def _watch(self) -> None:
        """Brings the selector in line with the connections: closed ones leave it, unsent bytes wait for room."""
        with self._news:
            for key in list(self._selector.get_map().values()):
                connection = key.data
                if connection is None:
                    continue
                if not connection.open:
                    self._selector.unregister(key.fileobj)
                    connection.sock.close()
                    continue
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
                if key.events != wanted:
                    self._selector.modify(key.fileobj, wanted, connection)

    def _drop(self, connection: _Connection, reason: str) -> None:
        """Marks a connection closed and tells the loop; the thread closes the socket. Called with the lock held."""
        if not connection.open:
            return
        connection.open = False
        connection.unsent.clear()
        connection.unsent_bytes = 0
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
        if self._current is connection:
            self._current = None
        self._inbox.append((Disconnected(reason), connection))
        self._news.notify_all()
        self._wake()

    def _check_thread(self) -> None:
        """An engine that hears nobody must end, so that it is started again, rather than go on deaf."""
        if self._thread is not None and not self._closing and not self._thread.is_alive():
            raise RuntimeError("the thread that serves the gateway's socket has died")

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"w")
