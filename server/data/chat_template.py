"""A model's chat template in jinja's immutable sandbox, rendering what transformers' `apply_chat_template` renders.

The template is the model's, the messages are a tenant's: they are plain JSON here, and stay data.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
_MARKS = "__generation_marks__"  # template variable: (opening, closing) while marks are asked for
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


class ChatTemplateError(Exception):
    """The template does not compile, or refuses these messages; the text is fit for the client."""


@dataclass(frozen=True, slots=True)
class MarkedChat:
    text: str
    spans: tuple[tuple[int, int], ...]  # [start, end) characters of each generation block, in order


class ChatTemplate:
    """Compiled once; `render` may run in any thread."""

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        """`specials` are the variables (bos_token, …) that the template sees. Raises ChatTemplateError."""
        self.source = source
        self._specials = dict(specials)
        self.has_marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the model's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat as text; encode it without adding special tokens. `variables` are the client's template kwargs.

        Raises ChatTemplateError.
        """
        chat = _prepared(messages)
        if not continue_final_message:
            return self._run(chat, tools, documents, add_generation_prompt, variables)
        if add_generation_prompt:
            raise ChatTemplateError("continue_final_message and add_generation_prompt exclude each other")
        final, tag = chat[-1].get("content"), f"\ue000{secrets.token_hex(8)}\ue001 "
        if not isinstance(final, str):
            raise ChatTemplateError("continue_final_message needs a final message whose content is text")
        # The tag ends in a space: a template that trims the message drops it, which tells what to cut.
        text = self._run([*chat[:-1], {**chat[-1], "content": final + tag}], tools, documents, False, variables)
        before, found, after = text.rpartition(tag.strip())
        if not found or final.strip() not in before:
            raise ChatTemplateError("continue_final_message: the chat template drops or alters the final message")
        return before if after.startswith(" ") else before.rstrip()

    def render_marked(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> MarkedChat:
        """The chat, and where the template's generation marks lie in it. Raises ChatTemplateError."""
        chat, nonce = _prepared(messages), secrets.token_hex(8)
        opening, closing = f"\ue000{nonce}\ue001", f"\ue001{nonce}\ue000"
        marked = self._run(chat, tools, None, False, {_MARKS: (opening, closing)})
        pieces, spans, length, start = [], [], 0, None
        for piece in re.split(f"({opening}|{closing})", marked):
            if piece == opening:
                start = length
            elif piece == closing:
                if start is not None:
                    spans.append((start, length))
                start = None
            else:
                pieces.append(piece)
                length += len(piece)
        text = "".join(pieces)
        if text != self._run(chat, tools, None, False, None):
            raise ChatTemplateError("the chat template alters the text of its own generation blocks")
        return MarkedChat(text, tuple(spans))

    def _run(
        self,
        chat: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        given = {
            **self._specials,
            **(variables or {}),
            "messages": chat,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(given)
        except _FAULTS as error:
            reason = getattr(error, "message", None) or str(error) or type(error).__name__
            raise ChatTemplateError(f"the model's chat template cannot render these messages: {reason}") from error


def _prepared(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies without null fields, which many templates would print, and with reasoning under its usual names."""
    if not messages:
        raise ChatTemplateError("there are no messages; give at least one")
    chat = []
    for message in messages:
        copy = {key: value for key, value in message.items() if value is not None}
        reasoning = next((copy[key] for key in _REASONING if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        chat.append(copy)
    return chat


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: prints its body, between marks where the caller asked for them."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_print", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _print(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        marks = context.get(_MARKS)
        body = caller()
        return body if marks is None else f"{marks[0]}{body}{marks[1]}"


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` that keeps no underscore names: they reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(…)` as a plain function, without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not use the namespace attribute {name!r}")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
