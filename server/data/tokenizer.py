"""The model's tokenizer and chat template. Safe for use by many threads at once: nothing changes after loading.

Encoding and decoding release the interpreter lock, so long texts belong in a worker thread, off the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from coserve.server.data.chat_template import ChatTemplate, ChatTemplateError
from coserve.server.data.default_template import DEFAULT_TEMPLATE
from coserve.server.data.token_bytes import TokenBytes
from coserve.server.data.tokenizer_files import read_tokenizer_files


@dataclass(frozen=True, slots=True)
class Offsets:
    """Token ids and, for each, the [start, end) characters of the text that it stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """`from_folder(model folder)`, then encode, decode and the ids that mean something."""

    def __init__(
        self,
        backend: Backend,
        specials: dict[str, str],
        template: str | None,
        model_stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._backend = backend
        self.specials = specials
        self._model_stop_ids = model_stop_ids
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.start_ids = self._start_ids()
        self.has_own_template = template is not None
        self.template = ChatTemplate(
            template if template is not None else DEFAULT_TEMPLATE,
            specials if template is not None else {**specials, "start": "".join(map(self._token, self.start_ids))},
        )
        self._bytes = TokenBytes(backend, self.added_ids)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a model folder. Raises TokenizerError (files) or ChatTemplateError (template)."""
        files = read_tokenizer_files(Path(folder))
        return cls(files.backend, dict(files.specials), files.chat_template, files.model_stop_ids)

    # ------------------------------------------------------------------ text and ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the tokenizer's own start (and end) tokens unless told otherwise.

        Raises ValueError for text with lone surrogates, which is no Unicode.
        """
        return self._backend.encode_batch_fast([_checked(text)], add_special_tokens=add_special_tokens)[0].ids

    def encode_with_spans(self, text: str) -> Offsets:
        """Token ids without added special tokens, and the characters of each. Raises ValueError as `encode`."""
        encoding = self._backend.encode(_checked(text), add_special_tokens=False)
        return Offsets(encoding.ids, encoding.offsets)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that goes on after other text: without the space that some tokenizers put before a first word."""
        anchor = self.encode("\n", add_special_tokens=False)
        ids = self.encode("\n" + text, add_special_tokens=False)
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; ids outside the vocabulary are left out."""
        known = [id_ for id_ in ids if 0 <= id_ < 2**32]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, id_: int) -> str | None:
        """The vocabulary's spelling of a token ("Ġhello", "▁hello"); None outside the vocabulary."""
        return self._backend.id_to_token(id_) if 0 <= id_ < 2**32 else None

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token adds to the text; b"" outside the vocabulary."""
        return self._bytes.of(id_)

    # ------------------------------------------------------------------ chats

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends an answer: of generation_config, config, the tokenizer, and the template's turn end."""
        found = set(self._model_stop_ids)
        if self.eos_id is not None:
            found.add(self.eos_id)
        turn_end = self._turn_end()
        if turn_end is not None:
            found.add(turn_end)
        return frozenset(found)

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The spellings of `stop_ids`, as they stand in a rendered chat."""
        return tuple(token for id_ in sorted(self.stop_ids) if (token := self.id_to_token(id_)) is not None)

    def _turn_end(self) -> int | None:
        """The added token that the template writes right after an assistant's words."""
        words = "Zq7 answer"
        try:
            text = self.template.render(
                [{"role": "user", "content": "Zq7 question"}, {"role": "assistant", "content": words}]
            )
        except ChatTemplateError:
            return None  # it wants other roles; the configured ids have to do
        _, found, after = text.rpartition(words)
        if not found or not after.strip():
            return None
        first = self.encode(after.lstrip(), add_special_tokens=False)[:1]
        return first[0] if first and first[0] in self.added_ids else None

    # ------------------------------------------------------------------ inside

    def _special_id(self, name: str) -> int | None:
        text = self.specials.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text, mostly one beginning-of-sequence token, or nothing."""
        with_specials = self._backend.encode("a", add_special_tokens=True)
        count = 0
        while count < len(with_specials.ids) and with_specials.special_tokens_mask[count]:
            count += 1
        return tuple(with_specials.ids[:count])

    def _token(self, id_: int) -> str:
        return self._backend.id_to_token(id_) or ""


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at character {error.start}; send valid Unicode") from None
    return text
