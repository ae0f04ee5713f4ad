"""Tar archives of PEFT folders: reading one that a stranger made, and writing one that is always the same bytes.

The reader is a small tar parser of its own, so that no header, however large or odd, is believed before it is
checked. It follows no link, makes no directory and writes two names only; everything else in the archive is skipped
or refused. What the two files contain is the engine's business.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MAX_MEMBERS = 64
MAX_CONFIG_BYTES = 1024**2
MAX_EXTENSION_HEADER = 64 * 1024
BLOCK = 512
CHUNK = 1024**2
REFUSED_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".py", ".so"}
)

_LINKS_AND_DEVICES = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
}  # fmt: skip


class ArchiveError(Exception):
    """The archive cannot be taken; the message names the member and the remedy, never a path of the server."""


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    size: int
    kind: bytes


def extract_adapter(archive: Path, folder: Path, max_bytes: int) -> None:
    """Write the archive's adapter_config.json and adapter_model.safetensors into `folder`, which exists and is empty.

    The archive is a tar, plain or gzipped, with the files at its top or inside one folder. `max_bytes` bounds the
    unpacked bytes. Raises ArchiveError; the caller removes `folder` then. Blocks.
    """
    with archive.open("rb") as raw:
        magic = raw.read(2)
        raw.seek(0)
        try:
            if magic == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    _extract(_Bounded(unpacked, max_bytes), folder, max_bytes)
            else:
                _extract(_Bounded(raw, max_bytes), folder, max_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ArchiveError("The archive's gzip data is damaged or cut off; pack and upload it again.") from None


def pack_adapter(files: dict[str, tuple[BinaryIO, int]]) -> Iterator[bytes]:
    """A tar of the open files, given as name -> (handle, size): equal contents give equal bytes. Closes the handles."""
    try:
        for name in sorted(files):
            handle, size = files[name]
            yield _header(name, size)
            left = size
            while left:
                chunk = handle.read(min(CHUNK, left))
                if not chunk:
                    raise OSError(f"{name} became shorter while it was read")
                left -= len(chunk)
                yield chunk
            yield b"\0" * (-size % BLOCK)
        yield b"\0" * (2 * BLOCK)
    finally:
        for handle, _ in files.values():
            handle.close()


def packed_size(sizes: list[int]) -> int:
    """Bytes of `pack_adapter`'s output for files of these sizes."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes) + 2 * BLOCK


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


class _Bounded:
    """Reads exactly what is asked for, and no more than `limit` bytes in all."""

    def __init__(self, source: BinaryIO | gzip.GzipFile, limit: int) -> None:
        self._source = source
        self._left = limit + (MAX_MEMBERS + 4) * (BLOCK * 4) + 2 * MAX_EXTENSION_HEADER
        self._limit = limit

    def exactly(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise ArchiveError(f"The archive unpacks to more than {self._limit} bytes.")
        parts = []
        while size:
            part = self._source.read(size)
            if not part:
                raise ArchiveError("The archive is cut off; pack and upload it again.")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def rest(self) -> None:
        """Read to the end, so that a compressed archive's checksum is compared."""
        while part := self._source.read(CHUNK):
            self._left -= len(part)
            if self._left < 0:
                raise ArchiveError(f"The archive unpacks to more than {self._limit} bytes.")

    def skip(self, size: int) -> None:
        while size > 0:
            step = min(size, CHUNK)
            self.exactly(step)
            size -= step


def _extract(source: _Bounded, folder: Path, max_bytes: int) -> None:
    home: str | None = None  # the one folder of the archive that holds the two files
    written: set[str] = set()
    for member in _members(source):
        path = _safe_path(member.name)
        if member.kind == b"5":
            source.skip(member.size + -member.size % BLOCK)
            continue
        if path.suffix.lower() in REFUSED_SUFFIXES:
            raise ArchiveError(
                f"{path.name!r} is a file that could run code when it is loaded; save the adapter as safetensors "
                "(save_pretrained(..., safe_serialization=True)) and pack only that folder."
            )
        if path.name not in (CONFIG_FILE, TENSOR_FILE):
            source.skip(member.size + -member.size % BLOCK)
            continue
        parent = str(path.parent)
        if path.name in written or (home is not None and parent != home):
            raise ArchiveError(f"The archive holds {path.name!r} twice, or two adapters; pack one adapter's folder.")
        if path.name == CONFIG_FILE and member.size > MAX_CONFIG_BYTES:
            raise ArchiveError(f"{CONFIG_FILE} is {member.size} bytes; at most {MAX_CONFIG_BYTES} are allowed.")
        if member.size > max_bytes:
            raise ArchiveError(f"{path.name!r} is {member.size} bytes; at most {max_bytes} are allowed.")
        home = parent
        written.add(path.name)
        with (folder / path.name).open("xb") as target:
            left = member.size
            while left:
                chunk = source.exactly(min(CHUNK, left))
                target.write(chunk)
                left -= len(chunk)
        source.skip(-member.size % BLOCK)
    missing = {CONFIG_FILE, TENSOR_FILE} - written
    if missing:
        raise ArchiveError(
            f"The archive has no {' and no '.join(sorted(missing))}; upload a tar of the folder that PEFT's "
            "save_pretrained wrote."
        )


def _members(source: _Bounded) -> Iterator[Member]:
    """Headers of regular files and directories, in order. The caller reads or skips each one's padded contents."""
    name: str | None = None
    size: int | None = None
    for count in range(3 * MAX_MEMBERS + 1):
        if count == 3 * MAX_MEMBERS:
            raise ArchiveError(f"The archive has more than {MAX_MEMBERS} members.")
        block = source.exactly(BLOCK)
        if block == b"\0" * BLOCK:
            source.rest()
            return
        header = _parse_header(block)
        if header.kind in (b"x", b"g", b"L"):
            if header.size > MAX_EXTENSION_HEADER:
                raise ArchiveError(f"The archive has an extension header of {header.size} bytes.")
            content = source.exactly(header.size)
            source.skip(-header.size % BLOCK)
            if header.kind == b"L":
                name = _text(content.split(b"\0", 1)[0])
            elif header.kind == b"x":
                records = _pax_records(content)
                name = records.get("path", name)
                size = _pax_size(records, size)
            continue
        member = Member(name if name is not None else header.name, header.size if size is None else size, header.kind)
        name = size = None
        if member.kind in _LINKS_AND_DEVICES:
            raise ArchiveError(f"{clip(member.name)} is {_LINKS_AND_DEVICES[member.kind]}; pack plain files only.")
        if member.kind not in (b"0", b"\0", b"7", b"5"):
            raise ArchiveError(f"{clip(member.name)} is not a plain file; pack plain files only.")
        if member.kind == b"\0" and member.name.endswith("/"):
            member = Member(member.name, member.size, b"5")
        yield member


def _parse_header(block: bytes) -> Member:
    recorded = _octal(block[148:156])
    if recorded != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise ArchiveError("The file is not a tar archive, or it is damaged; upload a .tar or .tar.gz.")
    name = _text(block[:100].split(b"\0", 1)[0])
    if block[257:263] == b"ustar\0":
        prefix = _text(block[345:500].split(b"\0", 1)[0])
        name = f"{prefix}/{name}" if prefix else name
    return Member(name, _octal(block[124:136]), block[156:157])


def _octal(digits: bytes) -> int:
    text = digits.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise ArchiveError("The file is not a tar archive, or it is damaged; upload a .tar or .tar.gz.")
    return int(text or b"0", 8)


def _pax_records(content: bytes) -> dict[str, str]:
    """The path and size among records of the form `<length> <key>=<value>\\n`, length counting all of it."""
    records: dict[str, str] = {}
    while content:
        digits, space, _ = content[:8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record, content = content[:length], content[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or not equals or not record.endswith(b"\n"):
            raise ArchiveError("The archive has a damaged extension header.")
        if key.startswith(b"GNU.sparse"):
            raise ArchiveError("The archive has a sparse file; pack plain files only.")
        if key in (b"path", b"size"):
            records[_text(key)] = _text(value)
    return records


def _pax_size(records: dict[str, str], size: int | None) -> int | None:
    if "size" not in records:
        return size
    if not re.fullmatch(r"[0-9]{1,15}", records["size"]):
        raise ArchiveError("The archive has a damaged extension header.")
    return int(records["size"])


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ArchiveError("The archive has a name that is not UTF-8.") from None


def _safe_path(name: str) -> PurePosixPath:
    if not name or len(name) > 1024 or "\0" in name or "\\" in name or name.startswith("/"):
        raise ArchiveError(f"The archive has a member named {clip(name)}; names must be relative paths.")
    path = PurePosixPath(name)
    if ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ArchiveError(f"The archive has a member named {clip(name)}, which leads out of it.")
    return path


def clip(text: str) -> str:
    """A member's name, quoted, fit to be repeated in a message."""
    return ascii(text[:80]) + ("…" if len(text) > 80 else "")
