"""The row formats: which one a line is in, and its token ids and labels before any cutting.

A label stands at the position of its own token; the shift to the token before happens inside the engine, so the
label of a row's first token never counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.server.data.chat_rows import chat_row
from coserve.server.data.faults import RowFault, check_text
from coserve.server.data.token_row import IGNORED, TokenRow
from coserve.server.data.tokenizer import Tokenizer

LOSS_ON = ("assistant", "completion", "all")
_KNOWN = 'Give "messages", "prompt" and "completion", "text", or "input_ids" and "labels".'


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Turns one parsed line into tokens. `loss_on` is one of LOSS_ON."""

    tokenizer: Tokenizer
    vocab_size: int  # of the model: ids of pre-tokenized rows must be below
    loss_on: str = "assistant"

    def encode(self, row: Mapping[str, Any]) -> tuple[str, TokenRow]:
        """(format, tokens). Raises RowFault."""
        format_ = detect(row)
        if format_ == "tokens":
            return format_, _token_row(row, self.vocab_size)
        if format_ == "text":
            tokens = self._text(row)
        elif format_ == "completion":
            tokens = self._completion(row)
        else:
            tokens = chat_row(row, self.tokenizer, self.loss_on)
        if max(tokens.ids, default=0) >= self.vocab_size:
            raise RowFault(None, "the text holds a token that the model has no embedding for", "Remove it.")
        return format_, tokens

    def _text(self, row: Mapping[str, Any]) -> TokenRow:
        words = self.tokenizer.encode(text_field(row, "text"), add_special_tokens=False)
        start = list(self.tokenizer.start_ids)
        end = self._end(words)
        return TokenRow(start + words + end, [IGNORED] * len(start) + words + end)

    def _completion(self, row: Mapping[str, Any]) -> TokenRow:
        prompt_text, answer_text = text_field(row, "prompt"), text_field(row, "completion")
        prompt = self.tokenizer.encode(prompt_text, add_special_tokens=False)
        both = self.tokenizer.encode(prompt_text + answer_text, add_special_tokens=False)
        # A request tokenizes the prompt alone, so the answer has to start at a token border of its own.
        if both[: len(prompt)] == prompt:
            answer = both[len(prompt) :]
        else:
            answer = self.tokenizer.encode_continuation(answer_text)
        start = list(self.tokenizer.start_ids)
        ids = start + prompt + answer + self._end(answer)
        unlabelled = len(start) + (0 if self.loss_on == "all" else len(prompt))
        return TokenRow(ids, [IGNORED] * unlabelled + ids[unlabelled:])

    def _end(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_id
        return [] if eos is None or ids[-1:] == [eos] else [eos]


def detect(row: Mapping[str, Any]) -> str:
    """ "tokens" | "chat" | "completion" | "text". Raises RowFault if it is none, or more than one."""
    found = [
        name
        for name, keys in {
            "tokens": ("input_ids",), "chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)
        }.items()
        if any(key in row for key in keys)
    ]  # fmt: skip
    if not row:
        raise RowFault(None, "the row is empty", _KNOWN)
    if not found:
        raise RowFault(None, f"the row has none of the known fields, but {_names(row)}", _KNOWN)
    if len(found) > 1:
        raise RowFault(None, f"the row is ambiguous: it has the fields {_names(row)}", _KNOWN + " Not several of them.")
    if row.get("functions") or row.get("tools"):
        raise RowFault("tools", "tools are not supported yet", "Remove the field, or write the calls as plain text.")
    return found[0]


def text_field(row: Mapping[str, Any], name: str) -> str:
    """A field that must be a non-empty, encodable string. Raises RowFault."""
    value = row.get(name)
    if name not in row:
        raise RowFault(name, "the field is missing", "Add it.")
    if not isinstance(value, str):
        hint = 'Use "messages" for chats.' if isinstance(value, list) else "Put the text in quotes."
        raise RowFault(name, "not a string", hint)
    if not value:
        raise RowFault(name, "the text is empty", "Fill it in, or remove the row.")
    check_text(value, name)
    return value


def _token_row(row: Mapping[str, Any], vocab_size: int) -> TokenRow:
    ids = _id_list(row, "input_ids", vocab_size, lowest=0)
    if not ids:
        raise RowFault("input_ids", "the row has no tokens", "Fill it in, or remove the row.")
    labels = _id_list(row, "labels", vocab_size, lowest=IGNORED)
    if len(labels) != len(ids):
        raise RowFault(
            "labels", f"{len(labels)} labels for {len(ids)} input_ids", "Give one label a token; -100 bears no loss."
        )
    mask = row.get("attention_mask")
    if mask is not None and mask != [1] * len(ids):
        raise RowFault("attention_mask", "a mask that is not all ones", "Leave padding out: rows may differ in length.")
    return TokenRow(ids, labels)


def _id_list(row: Mapping[str, Any], name: str, vocab_size: int, *, lowest: int) -> list[int]:
    values = row.get(name)
    if not isinstance(values, list):
        reason = "the field is missing" if name not in row else "not a list"
        raise RowFault(name, reason, "Give a list of token ids.")
    for index, value in enumerate(values):
        if type(value) is not int:  # also refuses True and 3.0
            raise RowFault(f"{name}[{index}]", "not a whole number", "Give token ids.")
        if not (0 <= value < vocab_size or value == lowest):
            allowed = f"0 to {vocab_size - 1}" + (" or -100" if lowest == IGNORED else "")
            raise RowFault(f"{name}[{index}]", f"{value} is not in the vocabulary", f"Use ids from {allowed}.")
    return values


def _names(row: Mapping[str, Any]) -> str:
    names = [repr(key[:40]) for key in list(row)[:5]]
    return ", ".join(names) + (", …" if len(row) > 5 else "")
