"""One sequence in the engine, as its reader sees it: tokens pile up, merged, until somebody takes them."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from coserve.server.wire.messages import Failed, Generate, TokenLogprob, Tokens

_TOKENS_AT_ONCE = 2048


class SequenceFailed(Exception):
    """A sequence ended without a result; `code` is an error code of the API."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Update:
    """Everything that came for a sequence since it was last asked."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    cached_tokens: int
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...]
    stop_token: bool


class EngineSequence:
    """One running sequence: `take` after every `news` until a finish reason, then `close`; closing early aborts it."""

    def __init__(self, message: Generate, news: asyncio.Event, forget: Callable[[EngineSequence], None]) -> None:
        self._forget = forget
        self._news = news
        self._parts: deque[Tokens] = deque()
        self._failure: SequenceFailed | None = None
        self.message = message
        self.attempt = 0
        self.started = False
        self.finished = False

    @property
    def wire_id(self) -> str:
        """A new id for every attempt: a lost connection's tokens must not reach the sequence that replaced it."""
        return self.message.request_id if self.attempt == 0 else f"{self.message.request_id}~{self.attempt}"

    def take(self) -> Update | None:
        """What came since the last call, merged; None if nothing did. Raises SequenceFailed.

        At most some thousand tokens at once: whoever comes back late must not hold the event loop for all of them.
        """
        parts: list[Tokens] = []
        tokens = 0
        while self._parts and tokens < _TOKENS_AT_ONCE:
            parts.append(self._parts.popleft())
            tokens += len(parts[-1].token_ids)
        if self._parts or self._failure is not None:
            self._news.set()  # more to take; what is taken now may be no text yet, after which its reader waits
        if not parts:
            if self._failure is not None:
                raise self._failure
            return None
        return Update(
            token_ids=tuple(itertools.chain.from_iterable(part.token_ids for part in parts)),
            finish_reason=parts[-1].finish_reason,
            cached_tokens=parts[-1].cached_tokens,
            logprobs=tuple(itertools.chain.from_iterable(part.logprobs for part in parts)),
            prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs), ()),
            stop_token=parts[-1].stop_token,
        )

    def close(self) -> None:
        """Ends the caller's interest; the engine is told if the sequence still runs. Idempotent."""
        self._forget(self)

    def deliver(self, part: Tokens) -> None:
        """Tokens that came from the engine."""
        self.started = True
        self.finished = part.finish_reason is not None
        self._parts.append(part)
        self._news.set()

    def expire(self, now: float) -> None:
        """While there is no engine to do so: ends the sequence if it is past its deadline."""
        if self.message.deadline is not None and self.message.deadline <= now and not self.finished:
            late = Failed.past_deadline(self.message)
            self.fail(late.code, late.message)

    def fail(self, code: str, message: str) -> None:
        """Ends the sequence for its reader, who gets SequenceFailed after what came before."""
        self.finished = True
        self._failure = SequenceFailed(code, message)
        self._news.set()
