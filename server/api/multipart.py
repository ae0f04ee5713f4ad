"""Multipart bodies, written to disk while they arrive: memory stays small whatever a client sends.

Nothing of an upload that is aborted, malformed or too large is left behind. File names are what the client said,
checked, and are only ever shown again: no path is made of them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from coserve.server.api.errors import ApiError, clip, invalid

MAX_PARTS = 16
MAX_FIELD_BYTES = 64 * 1024
_WRITE_BYTES = 1024**2  # bytes collected before a thread is asked to write them
_HIDDEN = re.compile(r"%(?:2e|2f|5c|00|25)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Upload:
    """One file part, whole and on disk."""

    path: Path
    filename: str
    size: int
    sha256: str  # hex


@dataclass(slots=True)
class Form:
    folder: Path  # scratch space of this request, removed with it
    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Upload]] = field(default_factory=dict)

    def only_file(self, name: str) -> Upload:
        """The one, non-empty file called `name`. Raises a 400 if there is none, or several."""
        found = self.files.get(name, [])
        if not found:
            raise invalid(f"Missing required parameter: '{name}', a file.", name, code="missing_required_parameter")
        if len(found) > 1:
            raise invalid(f"'{name}' was sent {len(found)} times; send one file a request.", name)
        if found[0].size == 0:
            raise invalid(f"The file {clip(found[0].filename)!r} is empty.", name, code="empty_file")
        return found[0]

    def field(self, name: str) -> str:
        """The text of the form field `name`. Raises a 400 if it is missing."""
        if name not in self.fields:
            raise invalid(f"Missing required parameter: '{name}'.", name, code="missing_required_parameter")
        return self.fields[name]


@asynccontextmanager
async def multipart_form(request: Request, scratch: Path, max_file_bytes: int) -> AsyncIterator[Form]:
    """Receive the request's multipart body into a fresh folder under `scratch`, which is removed on leaving.

    Raises 400 for a malformed body, 413 for a file over `max_file_bytes`, 503 if the disk is full.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 256:
        raise invalid("Send the file as multipart/form-data.", code="invalid_content_type")
    folder = scratch / f"upload-{secrets.token_hex(16)}"
    try:
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True)
        receiver = _Receiver(Form(folder), boundary, max_file_bytes)
        try:
            async for chunk in request.stream():
                receiver.feed(chunk)
                if receiver.pending >= _WRITE_BYTES:
                    await asyncio.to_thread(receiver.flush)
            await asyncio.to_thread(receiver.finish)
        finally:
            receiver.close()
        yield receiver.form
    except ClientDisconnect:
        raise invalid("The upload was cut off.", code="upload_aborted") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise storage_full() from None
        raise
    finally:
        # A cancelled request (the client went away) must clean up too: a thread could not be awaited then.
        shutil.rmtree(folder, ignore_errors=True)


def storage_full() -> ApiError:
    return ApiError(
        503, "The server's disk is full; nothing was stored. Try again later.", code="storage_full",
        headers={"retry-after-ms": "60000"},
    )  # fmt: skip


def check_filename(name: str, param: str = "file") -> str:
    """`name`, if it is a plain file name; else a 400. Percent-encoded dots and slashes count as what they hide."""
    if not name or len(name.encode("utf-8")) > 255:
        raise invalid("The file's name must have 1 to 255 bytes.", param, code="invalid_filename")
    if name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name) or _HIDDEN.search(name):
        raise invalid(
            f"The file name {clip(name)!r} is not a plain name: leave out folders, '..', control characters and "
            "percent-encoding.", param, code="invalid_filename",
        )  # fmt: skip
    return name


class _Receiver:
    """Turns the parser's callbacks into fields and files. `feed` only parses; `flush` and `finish` write."""

    def __init__(self, form: Form, boundary: bytes, max_file_bytes: int) -> None:
        self.form = form
        self.pending = 0
        self._max_file_bytes = max_file_bytes
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._name = ""
        self._text: bytearray | None = None
        self._file: _OpenFile | None = None
        self._files: list[_OpenFile] = []
        self._ended = False
        self._writing = threading.Lock()  # a cancelled request must not close descriptors under a writing thread
        callbacks = {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_text,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError:
            raise invalid("The multipart body is malformed.", code="invalid_multipart") from None

    def flush(self) -> None:
        with self._writing:
            for one in self._files:
                one.write_pending()
            self.pending = 0

    def finish(self) -> None:
        """Write what is left, sync the files and put them into the form. Raises 400 if the body was cut off."""
        if not self._ended:
            raise invalid("The multipart body ends too early.", code="invalid_multipart")
        with self._writing:
            self._finish()

    def _finish(self) -> None:
        for one in self._files:
            one.write_pending()
            one.sync()
            upload = Upload(one.path, one.filename, one.size, one.digest.hexdigest())
            self.form.files.setdefault(one.field, []).append(upload)

    def close(self) -> None:
        with self._writing:
            for one in self._files:
                os.close(one.descriptor)
            self._files = []

    # ------------------------------------------------------------------ the parser's callbacks

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise invalid(f"The multipart body has more than {MAX_PARTS} parts.", code="invalid_multipart")
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        header = self._headers.get(b"content-disposition", b"")
        if b"\0" in header:
            raise invalid("A part's header has a NUL character.", "file", code="invalid_filename")
        _, options = parse_options_header(header.decode("latin-1"))
        self._name = _utf8(options.get(b"name", b""))
        if not self._name:
            raise invalid("A part of the multipart body has no name.", code="invalid_multipart")
        if b"filename" not in options:
            if self._name in self.form.fields:
                raise invalid(f"'{clip(self._name)}' was sent twice.", clip(self._name))
            self._text, self._file = bytearray(), None
            return
        filename = check_filename(_utf8(options[b"filename"]), clip(self._name))
        path = self.form.folder / f"part-{len(self._files)}"
        self._text, self._file = None, _OpenFile(self._name, filename, path)
        self._files.append(self._file)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.size += end - start
            if self._file.size > self._max_file_bytes:
                raise ApiError(
                    413, f"The file is larger than {self._max_file_bytes} bytes, the most that can be uploaded.",
                    param=clip(self._name), headers={"connection": "close"},
                )  # fmt: skip
            self._file.waiting.append(data[start:end])
            self.pending += end - start
        elif self._text is not None:
            self._text += data[start:end]
            if len(self._text) > MAX_FIELD_BYTES:
                raise invalid(f"'{clip(self._name)}' is longer than {MAX_FIELD_BYTES} bytes.", clip(self._name))

    def _part_end(self) -> None:
        if self._text is not None:
            value = _utf8(bytes(self._text))
            if "\0" in value:
                raise invalid(f"'{clip(self._name)}' has a NUL character.", clip(self._name))
            self.form.fields[self._name] = value
        self._text = self._file = None

    def _end(self) -> None:
        self._ended = True


class _OpenFile:
    """A file part on its way to disk."""

    def __init__(self, field: str, filename: str, path: Path) -> None:
        self.field = field
        self.filename = filename
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()
        self.waiting: list[bytes] = []
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write_pending(self) -> None:
        waiting, self.waiting = self.waiting, []
        for part in waiting:
            self.digest.update(part)
            view = memoryview(part)
            while view:
                view = view[os.write(self.descriptor, view) :]

    def sync(self) -> None:
        os.fsync(self.descriptor)


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("A name or value in the multipart body is not UTF-8.", code="invalid_multipart") from None
