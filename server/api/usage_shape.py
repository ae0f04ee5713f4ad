"""Token counts and log-probabilities, as both generation routes show them."""

from __future__ import annotations

import math
from typing import Any

from coserve.server.gateway.text import TextModel
from coserve.server.store.usage import Usage
from coserve.server.wire.messages import TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "computed_tokens": usage.computed_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def chat_logprob(text: TextModel, entry: TokenLogprob) -> dict[str, Any]:
    """One entry of a chat choice's `logprobs.content`."""
    return {
        **_chat_token(text, entry.token_id, entry.logprob),
        "top_logprobs": [_chat_token(text, token_id, logprob) for token_id, logprob in entry.top],
    }


def _chat_token(text: TextModel, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": text.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(text.tokenizer.token_bytes(token_id)),
    }


def token_label(text: TextModel, token_id: int) -> str:
    """A token as completions name it: its text, or `bytes:\\xe6\\x9d` where that is no whole character.

    Models have more ids than their tokenizers have tokens: the others are named by number.
    """
    data = text.tokenizer.token_bytes(token_id)
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
