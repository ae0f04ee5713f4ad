"""Turns token ids into text, one token at a time, so that a character is shown once all its bytes are there.

What it yields depends on the ids only, not on how they arrive: joined pieces are the whole text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from coserve.server.data.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 5  # ids before the new ones that a tokenizer's decoder may look at
_PROBES = 64


class TextForm(Enum):
    """How a tokenizer's text comes out of its tokens' bytes."""

    JOINED = "joined"
    JOINED_LESS_SPACE = "joined, without one space at the very start"
    OTHER = "in some other way"


def text_form(tokenizer: Tokenizer) -> TextForm:
    """Found by trial: sequences of tokens that are whole characters, spread over the vocabulary, are decoded."""
    whole = [id_ for id_ in _spread(tokenizer.vocab_size, 4 * _PROBES) if _is_whole(tokenizer.token_bytes(id_))]
    whole = [id_ for id_ in whole if id_ not in tokenizer.added_ids]
    less_space = False
    for start in range(len(whole)):
        ids = [*whole[start : start + 3], *whole[:2]]
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
        text = tokenizer.decode(ids)
        if text != joined:
            if text != joined.removeprefix(" "):
                return TextForm.OTHER
            less_space = True
        elif less_space and joined.startswith(" "):
            return TextForm.OTHER
    return TextForm.JOINED_LESS_SPACE if less_space else TextForm.JOINED


def _spread(size: int, count: int) -> range:
    return range(0, size, max(1, size // count))


def _is_whole(data: bytes) -> bool:
    try:
        return bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


class Detokenizer(Protocol):
    """The text of one sequence, as it grows."""

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; often none, when it ends inside one."""

    def finish(self) -> str:
        """What an unfinished character leaves, when no more tokens will come."""


class ByteDetokenizer:
    """For tokenizers whose text is their tokens' bytes, joined: nearly all."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = drop_space

    def feed(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other tokenizer: decodes the last few tokens again with each new one, and shows what was added."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context = list(prompt_ids[-_CONTEXT:])
        self._new: list[int] = []

    def feed(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._added()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context = [*self._context, *self._new][-_CONTEXT:]
        self._new = []
        return text

    def finish(self) -> str:
        return self._added() if self._new else ""

    def _added(self) -> str:
        before = self._decode(self._context)
        both = self._decode([*self._context, *self._new])
        return both[len(before) :] if both.startswith(before) else self._decode(self._new)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


def make_detokenizer(
    tokenizer: Tokenizer, form: TextForm, *, skip_special: bool, continues: Sequence[int] = ()
) -> Detokenizer:
    """A detokenizer for ids that follow the ids `continues`: none for an answer that stands for itself."""
    if form is TextForm.OTHER:
        return WindowDetokenizer(tokenizer, skip_special=skip_special, prompt_ids=continues)
    drop_space = form is TextForm.JOINED_LESS_SPACE and not continues
    return ByteDetokenizer(tokenizer, skip_special=skip_special, drop_space=drop_space)
