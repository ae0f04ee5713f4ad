"""Chat rows: the model's template gives the tokens, and says which of them are the assistant's.

Where the template has generation marks they are the mask. Else an assistant turn is what the chat up to and with
the turn has more than the chat before it with a generation prompt: from where the model would have begun to speak to
where it would have stopped. A template for which neither holds is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coserve.server.data.chat_template import ChatTemplateError
from coserve.server.data.faults import RowFault, check_text
from coserve.server.data.messages import joined, template_role
from coserve.server.data.token_row import IGNORED, TokenRow
from coserve.server.data.tokenizer import Tokenizer

Span = tuple[int, int]  # [start, end) characters of the rendered chat
MOST_MESSAGES = 1000  # by prefix difference each answer renders all before it again: half a second at this many
_ROLES = ("system", "developer", "user", "assistant")


def chat_row(row: Mapping[str, Any], tokenizer: Tokenizer, loss_on: str) -> TokenRow:
    """Tokens and labels of `{"messages": [...]}`. Raises RowFault."""
    messages, weights = _messages(row)
    speaking = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not speaking:
        raise RowFault("messages", "there is no assistant message to learn from", "Add the answer.")
    wanted = speaking[-1:] if loss_on == "completion" else [index for index in speaking if weights[index]]
    if not wanted and loss_on != "all":
        raise RowFault(
            "messages", "every assistant message has weight 0", "Give one of them weight 1, or remove the row."
        )
    try:
        text, spans = _render(messages, speaking, wanted, tokenizer, needs_spans=loss_on != "all")
    except ChatTemplateError as error:
        raise RowFault(
            "messages", str(error), "Change the messages so that the model's chat template takes them."
        ) from None
    check_text(text, "messages")  # a template may print other fields than the content
    encoded = tokenizer.encode_with_spans(text)
    if loss_on == "all":
        return TokenRow(encoded.ids, list(encoded.ids))
    return TokenRow(encoded.ids, _labels(encoded.ids, encoded.spans, spans))


def _render(
    messages: list[dict[str, Any]], speaking: list[int], wanted: list[int], tokenizer: Tokenizer, *, needs_spans: bool
) -> tuple[str, list[Span]]:
    template = tokenizer.template
    if not needs_spans:
        return template.render(messages), []
    if template.has_marks:
        marked = template.render_marked(messages)
        if len(marked.spans) == len(speaking):
            return marked.text, [span for index, span in zip(speaking, marked.spans, strict=True) if index in wanted]
        if marked.spans and wanted == speaking:
            return marked.text, list(marked.spans)
        if marked.spans:
            raise RowFault(
                "messages",
                "the chat template does not mark each assistant message by itself, so they cannot be weighted apart",
                "Leave the weights out.",
            )
    if len(messages) > MOST_MESSAGES:
        raise RowFault(
            "messages",
            f"{len(messages)} messages, and the model's chat template has no generation marks: at most {MOST_MESSAGES} "
            "can be told apart",
            "Split the chat.",
        )
    text = template.render(messages)
    return text, [_turn(text, messages, index, tokenizer) for index in wanted]


def _turn(text: str, messages: list[dict[str, Any]], index: int, tokenizer: Tokenizer) -> Span:
    """Where message `index` is spoken in `text`, by prefix difference."""
    if index == 0:
        raise RowFault(
            "messages[0]", "the chat begins with an answer", "Put the user's message first, or give this one weight 0."
        )
    before = tokenizer.template.render(messages[:index], add_generation_prompt=True)
    through = tokenizer.template.render(messages[: index + 1])
    if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
        raise RowFault(
            f"messages[{index}]",
            "the model's chat template renders this turn differently inside the whole chat, so it cannot be told "
            "which tokens bear loss",
            'Use loss_on "completion" (the last answer only), one answer a row, or "prompt" and "completion".',
        )
    return len(before), len(before) + _spoken(text[len(before) : len(through)], tokenizer.stop_texts)


def _spoken(turn: str, stop_texts: Sequence[str]) -> int:
    """Characters of a turn up to and with its end token: a line break after it is the template's, not the model's."""
    words = turn.rstrip()
    return len(words) if words.endswith(tuple(stop_texts)) else len(turn)


def _labels(ids: list[int], token_spans: list[Span], spans: list[Span]) -> list[int]:
    """Label every token of which at least one character lies in one of the spans, which are in order."""
    labels = [IGNORED] * len(ids)
    current = 0
    for position, (start, end) in enumerate(token_spans):
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        if current == len(spans):
            break
        if start < end and end > spans[current][0]:
            labels[position] = ids[position]
    return labels


def _messages(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """Checked messages, with plain text as content, and the weight of each."""
    given = row["messages"]
    if not isinstance(given, list) or not given:
        raise RowFault(
            "messages", "not a list of messages" if given != [] else "the list is empty", "Give the chat's turns."
        )
    messages, weights = [], []
    for index, message in enumerate(given):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RowFault(field, "not an object", 'Write {"role": "…", "content": "…"}.')
        role = message.get("role")
        if role not in _ROLES:
            raise RowFault(f"{field}.role", f"{role!r:.60} is no role", f"Use one of {', '.join(_ROLES)}.")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise RowFault(f"{field}.{name}", "calls are not supported yet", "Write them as plain text.")
        weight = message.get("weight", 1)
        if weight not in (0, 1) or isinstance(weight, bool):
            raise RowFault(f"{field}.weight", "not 0 or 1", "Use 1 to learn from the message, 0 not to.")
        if "weight" in message and role != "assistant":
            raise RowFault(f"{field}.weight", f"a weight on a {role} message", "Only assistant messages have one.")
        copy = {key: value for key, value in message.items() if key not in ("weight", "tool_calls", "function_call")}
        copy["role"] = template_role(role)
        copy["content"] = _content(message.get("content"), f"{field}.content")
        messages.append(copy)
        weights.append(int(weight))
    return messages, weights


def _content(content: object, field: str) -> str:
    if isinstance(content, list):
        texts = []
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowFault(
                    f"{field}[{index}]", "not a text part", 'Only {"type": "text", "text": "…"} is supported.'
                )
            texts.append(part["text"])
        content = joined(texts)
    if not isinstance(content, str):
        raise RowFault(field, "missing" if content is None else "not a string", "Give the message's text.")
    check_text(content, field)
    return content
