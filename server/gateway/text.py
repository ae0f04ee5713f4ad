"""Text into token ids and back, for the event loop: long work runs in threads, hopeless work is refused before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.server.data.tokenizer import Tokenizer
from coserve.server.gateway.detokenizer import Detokenizer, TextForm, make_detokenizer, text_form


@dataclass(frozen=True, slots=True)
class Chat:
    """What a chat template is given."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] | None = None


class TooLong(Exception):
    """A text that cannot fit, seen without tokenizing it; `at_least` tokens is a lower bound."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least


class TextModel:
    """One tokenizer and what was found out about it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._form = text_form(tokenizer)
        ids = range(tokenizer.vocab_size)
        self._longest_token = max((len(tokenizer.token_bytes(id_)) for id_ in ids), default=1) or 1

    def detokenizer(self, skip_special: bool, continues: Sequence[int] = ()) -> Detokenizer:
        return make_detokenizer(self.tokenizer, self._form, skip_special=skip_special, continues=continues)

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole character show as the replacement character."""
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    async def encode(self, text: str, *, add_special_tokens: bool = True, limit: int | None = None) -> tuple[int, ...]:
        """Token ids, made in a thread. Raises TooLong where more than `limit` tokens are certain beforehand."""
        return await asyncio.to_thread(self._encode, text, add_special_tokens, limit)

    async def encode_chat(self, chat: Chat, *, limit: int | None = None) -> tuple[int, ...]:
        """Token ids of a rendered chat. Raises ChatTemplateError, TooLong."""
        return await asyncio.to_thread(self._encode_chat, chat, limit)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=skip_special_tokens)

    def _encode_chat(self, chat: Chat, limit: int | None) -> tuple[int, ...]:
        text = self.tokenizer.template.render(
            chat.messages,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            variables=chat.variables,
        )
        return self._encode(text, False, limit)

    def _encode(self, text: str, add_special_tokens: bool, limit: int | None) -> tuple[int, ...]:
        # Every token stands for at most so many bytes, unless the tokenizer drops text: then trial found another form.
        if limit is not None and self._form is not TextForm.OTHER:
            at_least = -(-len(text) // self._longest_token)
            if at_least > limit:
                raise TooLong(at_least)
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
