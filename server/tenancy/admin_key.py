"""The admin key of a data directory: made at the first start, kept in a file that only its owner reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from coserve.server.store.atomic import write_atomic
from coserve.server.store.errors import StoreUnavailable
from coserve.server.store.ids import new_secret_key

SHORTEST = 16


def load_admin_key(path: Path, given: str | None = None) -> str:
    """The admin key: `given` (from the settings) if there is one, else that of the file, which is made if need be.

    A given key is not written to the file. Raises StoreUnavailable if the file cannot be used, ValueError for a
    given key that is too short to be one.
    """
    if given is not None:
        if len(given) < SHORTEST or not given.isascii() or not given.isprintable() or " " in given:
            raise ValueError(f"the admin key must be at least {SHORTEST} printable ASCII characters without spaces")
        return given
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        secret = new_secret_key()
        try:
            write_atomic(path, secret.encode("ascii") + b"\n", mode=0o600)
        except OSError as error:
            raise StoreUnavailable(f"The admin key cannot be written to {path} ({error.strerror}).") from error
        return secret
    except OSError as error:
        raise StoreUnavailable(f"The admin key cannot be read from {path} ({error.strerror}).") from error
    with os.fdopen(descriptor, "rb") as stream:
        if stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077:
            os.fchmod(stream.fileno(), 0o600)
        secret = stream.read(4096).decode("ascii", "replace").strip()
    if len(secret) < SHORTEST:
        raise StoreUnavailable(f"{path} holds no key. Remove it and start again: a new admin key is made.")
    return secret
