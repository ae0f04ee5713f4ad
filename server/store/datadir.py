"""The data directory: where everything lies, who may use it, and which base model it belongs to.

One supervisor at a time holds the lock; the processes that it starts only open the directory. Every path made from
a client's text goes through `join`, which lets nothing out.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from coserve.server.store.atomic import sync_folder, write_atomic
from coserve.server.store.errors import StoreError

LAYOUT_VERSION = 1
FOLDERS = ("models", "files", "adapters", "jobs", "tmp")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


class DataDirectoryError(StoreError):
    """The directory cannot be used as it is; the message has the remedy."""


class DataDirectoryLocked(DataDirectoryError):
    """Another server uses the directory."""


class BaseModelChanged(DataDirectoryError):
    """The directory's adapters and jobs belong to another base model."""


class UnsafePath(StoreError):
    """A path that would leave its place."""


class DataDirectory:
    """Paths of one data directory. `prepare` and `lock` are the supervisor's; the others take it as it is."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._lock: int | None = None

    # ------------------------------------------------------------------ layout

    @property
    def database(self) -> Path:
        return self.root / "coserve.db"

    @property
    def admin_key(self) -> Path:
        return self.root / "admin-key"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def file(self, tenant: str, file_id: str) -> Path:
        return self.join("files", tenant, file_id)

    def adapter(self, tenant: str, adapter_id: str) -> Path:
        return self.join("adapters", tenant, adapter_id)

    def adapter_version(self, tenant: str, adapter_id: str, digest: str) -> Path:
        return self.join("adapters", tenant, adapter_id, digest)

    def job(self, job_id: str) -> Path:
        return self.join("jobs", job_id)

    def join(self, *parts: str) -> Path:
        """The path of `parts` below the root, each a plain name. Raises UnsafePath for anything else.

        A link among the existing folders is refused too: nothing that the server makes is one.
        """
        path = self.root
        for part in parts:
            if _PART.fullmatch(part) is None:
                raise UnsafePath(f"{part!r} is not a plain name of letters, digits, '.', '_' and '-'")
            path = path / part
            if path.is_symlink():
                raise UnsafePath(f"{part!r} is a link; the data directory must hold none")
        return path

    def resolve(self, relative: str) -> Path:
        """The path of a stored relative path ("adapters/default/…"). Raises UnsafePath."""
        return self.join(*relative.split("/"))

    def relative(self, path: Path) -> str:
        """The stored form of a path below the root. Raises UnsafePath."""
        try:
            parts = Path(path).relative_to(self.root).parts
        except ValueError:
            raise UnsafePath("the path lies outside the data directory") from None
        self.join(*parts)
        return "/".join(parts)

    # ------------------------------------------------------------------ preparing

    def prepare(self) -> None:
        """Make the folders and the layout file. Raises DataDirectoryError for what it cannot use.

        Call with the lock held: it also empties `tmp`.
        """
        self._make_root()
        layout = self._read_layout()
        if layout.get("layout_version", LAYOUT_VERSION) != LAYOUT_VERSION:
            raise DataDirectoryError(
                f"The data directory {self.root} has layout version {layout['layout_version']!r}, this release knows "
                f"{LAYOUT_VERSION}. Run the release that made it, or give another --data-dir."
            )
        if "layout_version" not in layout:
            strange = sorted({entry.name for entry in self.root.iterdir()} - {"lock", "lost+found", *FOLDERS})
            if strange:
                raise DataDirectoryError(
                    f"{self.root} is not empty and is no data directory (it holds {strange[0]!r}). "
                    "Give an empty or a new folder as --data-dir."
                )
        try:
            for name in FOLDERS:
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
            if "layout_version" not in layout:
                self._write_layout({"layout_version": LAYOUT_VERSION, "base_digest": None})
            self.clean_tmp()
        except OSError as error:
            raise self._unusable(error) from error

    def clean_tmp(self) -> None:
        """Remove what a crash left in tmp/."""
        for entry in self.tmp.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def lock(self) -> int:
        """Take the directory for this process; the lock's descriptor. Raises DataDirectoryLocked.

        The lock ends with the last process that holds the descriptor: hand it to child processes (`pass_fds`) so
        that no second server starts while one of them still writes.
        """
        self._make_root()
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise DataDirectoryLocked(
                f"The data directory {self.root} is in use by another server"
                + (f" (process {holder})" if holder else "")
                + ". Stop that one, or give another --data-dir."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        return descriptor

    def unlock(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------------ base model

    def base_digest(self) -> str | None:
        """The base model's digest that the directory is bound to; None before the first start."""
        return self._read_layout().get("base_digest")

    def bind_base(self, digest: str) -> None:
        """Bind the directory to the base model on the first call. Raises BaseModelChanged for another one later."""
        layout = self._read_layout()
        bound = layout.get("base_digest")
        if bound is None:
            self._write_layout({**layout, "base_digest": digest})
        elif bound != digest:
            raise BaseModelChanged(
                f"The data directory {self.root} belongs to the base model {bound[:12]}, this one is {digest[:12]}: "
                "its adapters and jobs would not fit. Start with the model it was made for, or give another --data-dir."
            )

    # ------------------------------------------------------------------ inside

    def _make_root(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def _read_layout(self) -> dict:
        try:
            text = (self.root / "layout.json").read_text("utf-8")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unusable(error) from error
        try:
            layout = json.loads(text)
        except ValueError:
            layout = None
        if not isinstance(layout, dict) or "layout_version" not in layout:
            raise DataDirectoryError(
                f"{self.root / 'layout.json'} is damaged. Restore it from a backup, or give another --data-dir."
            )
        return layout

    def _write_layout(self, layout: dict) -> None:
        try:
            write_atomic(self.root / "layout.json", json.dumps(layout).encode() + b"\n")
            sync_folder(self.root)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> DataDirectoryError:
        return DataDirectoryError(
            f"The data directory {self.root} cannot be used ({error.strerror}). "
            "Make it writable for this user, free disk space, or give another --data-dir."
        )
