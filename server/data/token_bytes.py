"""The bytes behind a token id, also where they are only a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Reads the decoder's kind once: byte-level alphabet, byte-fallback tokens, or plain text."""

    def __init__(self, backend: Backend, added_ids: frozenset[int]) -> None:
        self._backend = backend
        self._added_ids = added_ids
        state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        steps = list(_flatten(state))
        self._byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        self._byte_fallback = any(step.get("type") == "ByteFallback" for step in steps)
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step.get("type") == "Replace" and "String" in step.get("pattern", {})
        ] + [(step["replacement"], " ") for step in steps if step.get("type") == "Metaspace"]

    def of(self, id_: int) -> bytes:
        """The token's bytes; b"" outside the vocabulary."""
        token = self._backend.id_to_token(id_) if 0 <= id_ < 2**32 else None
        if token is None:
            return b""
        if id_ in self._added_ids:
            return token.encode("utf-8")
        if self._byte_level:
            alphabet = byte_level_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


@cache
def byte_level_alphabet() -> Mapping[str, int]:
    """The printable characters that byte-level vocabularies write for the 256 byte values.

    Bytes that print stand for themselves; the others, in order, take the characters from U+0100 on.
    """
    alphabet: dict[str, int] = {}
    shifted = 0x100
    for value in range(256):
        if 0x21 <= value <= 0x7E or 0xA1 <= value <= 0xAC or 0xAE <= value <= 0xFF:
            alphabet[chr(value)] = value
        else:
            alphabet[chr(shifted)] = value
            shifted += 1
    return MappingProxyType(alphabet)


def _flatten(state: Any) -> Iterator[dict[str, Any]]:
    steps: Iterable[Any] = [state] if isinstance(state, dict) else []
    for step in steps:
        if step.get("type") == "Sequence":
            for inner in step.get("decoders", []):
                yield from _flatten(inner)
        else:
            yield step
