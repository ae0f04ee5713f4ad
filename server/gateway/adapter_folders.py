"""PEFT folders in the data directory: making one a version, reading what is shown of it, removing it.

Every function blocks on the disk. The engine has checked, or written, each folder that comes here.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from coserve.server.gateway.adapter_archive import CONFIG_FILE, TENSOR_FILE, ArchiveError
from coserve.server.store.adapters import AdapterVersion, NewVersion
from coserve.server.store.atomic import publish_folder, sync_folder
from coserve.server.store.datadir import DataDirectory

FOLDER_FILES = (CONFIG_FILE, TENSOR_FILE)


def copy_version(data: DataDirectory, source: str, tenant: str, adapter_id: str, digest: str) -> NewVersion:
    """Copy the adapter in the folder `source` (relative) to its place as version `digest`, without anything else in it.

    Repeats harmlessly. Raises OSError; nothing half done is left under the version's name.
    """
    place = data.adapter_version(tenant, adapter_id, digest)
    if not place.exists():
        scratch = data.tmp / f"version-{secrets.token_hex(16)}"
        try:
            scratch.mkdir(mode=0o700)
            for name in FOLDER_FILES:
                shutil.copyfile(data.resolve(source) / name, scratch / name, follow_symlinks=False)
            _publish(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return facts(data, place, digest)


def move_version(data: DataDirectory, source: Path, tenant: str, adapter_id: str, digest: str) -> NewVersion:
    """Make the folder `source` the version `digest`; where that is there already, `source` stays. Raises OSError."""
    place = data.adapter_version(tenant, adapter_id, digest)
    if not place.exists():
        _publish(source, place)
    return facts(data, place, digest)


def gather(files: Mapping[str, Path], folder: Path) -> None:
    """Move the files of one upload, given by name, into `folder`. Raises ArchiveError unless they are PEFT's two."""
    if set(files) != set(FOLDER_FILES):
        raise ArchiveError(f"Upload one tar, or exactly the two files {CONFIG_FILE} and {TENSOR_FILE}.")
    for name, path in files.items():
        os.rename(path, folder / name)


class NoAdapterFolder(Exception):
    """There is no readable PEFT folder at a path; the message names the file, not the path."""


def copy_in(source: Path, folder: Path, max_bytes: int) -> None:
    """Copy PEFT's two files from `source`, a folder of the operator's, into `folder`. Links are followed.

    Raises NoAdapterFolder, ArchiveError for a file over `max_bytes`, OSError for the disk that is written.
    """
    for name in FOLDER_FILES:
        try:
            found = (source / name).stat()
            if not stat.S_ISREG(found.st_mode):
                raise NoAdapterFolder(f"{name} is no plain file.")
            if found.st_size > max_bytes:
                raise ArchiveError(f"{name} is {found.st_size} bytes; at most {max_bytes} are allowed.")
            original = (source / name).open("rb")
        except (OSError, ValueError):  # ValueError: a NUL in the path
            raise NoAdapterFolder(f"{name} is not there or cannot be read.") from None
        with original, (folder / name).open("xb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)


def facts(data: DataDirectory, folder: Path, digest: str) -> NewVersion:
    """What is stored about a version folder."""
    config = read_config(folder)
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    return NewVersion(digest, data.relative(folder), max(ranks), sum((folder / n).stat().st_size for n in FOLDER_FILES))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder that the engine has checked."""
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
    return config


def open_files(folder: Path) -> dict[str, tuple[BinaryIO, int]]:
    """The folder's two files, open, with their sizes: they can be read to the end even if the version is deleted."""
    opened: dict[str, tuple[BinaryIO, int]] = {}
    try:
        for name in FOLDER_FILES:
            handle = (folder / name).open("rb")
            opened[name] = (handle, os.fstat(handle.fileno()).st_size)
    except OSError:
        for file, _ in opened.values():
            file.close()
        raise
    return opened


def remove_version(data: DataDirectory, path: str) -> None:
    """Remove a version's folder, and its adapter's folder when that was the last one. Repeats harmlessly."""
    folder = data.resolve(path)
    if folder.exists():
        shutil.rmtree(folder)
    try:
        folder.parent.rmdir()
    except OSError:
        return  # other versions are still there, or it is gone already


def remove_orphans(data: DataDirectory, known: Iterable[AdapterVersion]) -> None:
    """Remove version folders that no row names: what crashes left behind."""
    paths = {version.path for version in known}
    for folder in (data.root / "adapters").glob("*/*/*"):
        if "/".join(folder.relative_to(data.root).parts) not in paths:
            shutil.rmtree(folder)


def _publish(folder: Path, place: Path) -> None:
    for parent in (place.parent.parent, place.parent):
        if not parent.exists():
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(parent.parent)
    publish_folder(folder, place)
