"""Identifiers: a prefix that names the kind, and 22 random base62 characters (131 bits)."""

from __future__ import annotations

import secrets
import string

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
RANDOM_CHARACTERS = 22

FILE = "file-"
JOB = "ftjob-"
EVENT = "ftevent-"
CHECKPOINT = "ftckpt_"
PERMISSION = "cp_"
ADAPTER = "adapter-"
CHAT_COMPLETION = "chatcmpl-"
COMPLETION = "cmpl-"
REQUEST = "req-"
KEY = "key_"
TENANT = "tenant-"
SECRET_KEY = "sk-cs-"


def new_id(prefix: str) -> str:
    """`prefix` and 22 characters that nobody can guess."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARACTERS))


def new_secret_key() -> str:
    """An API key: `sk-cs-` and 44 base62 characters."""
    return new_id(SECRET_KEY) + new_id("")
