"""The few file operations that must survive a power cut: synced directories and files replaced in one step."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, at any time and after any crash, finds the old content or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def is_storage_full(error: OSError) -> bool:
    """Whether the error goes away when there is room again."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
