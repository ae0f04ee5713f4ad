"""What a generation request asks for, and the text of one of its choices: detokenized, searched for stops, cut."""

from __future__ import annotations

from dataclasses import dataclass

from coserve.server.gateway.detokenizer import Detokenizer
from coserve.server.gateway.engine_sequence import Update
from coserve.server.gateway.stop_strings import StopScanner
from coserve.server.tenancy.terms import Promise
from coserve.server.wire.messages import AdapterRef, SamplingParams, TenantShare, TokenLogprob


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request as the engine's sequences will need it. Choice i of prompt p has index p * n + i."""

    id: str
    tenant: str
    salt: str
    model: str  # as asked for; goes to the ledger
    adapter: AdapterRef | None
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: SamplingParams  # of choice 0
    promise: Promise
    share: TenantShare  # its tenant's
    timeout: float | None = None  # seconds from its arrival after which it is ended
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    continues_prompt: bool = False  # the text goes on from the prompt's, rather than standing for itself
    prompt_only: bool = False  # the one token that the engine must make is not part of the answer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice gained: text that is final, and the tokens that it, or text still held back, came from."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    offsets: tuple[int, ...]  # where each token's text begins in the choice's text, in characters
    prompt_logprobs: tuple[TokenLogprob | None, ...]
    finish_reason: str | None
    stop_reason: str | int | None = None  # the stop string, or the stop token that the client gave


class Choice:
    """The text of one sequence: detokenized, searched for stop strings, cut at the end."""

    def __init__(self, index: int, request: GenerationRequest, detokenizer: Detokenizer) -> None:
        self.index = index
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.done = False
        self._request = request
        self._detokenizer = detokenizer
        self._scanner = StopScanner(request.stop, include=request.include_stop)
        self._length = 0  # characters of all tokens so far, shown or held back
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._offsets: list[int] = []
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    def accept(self, update: Update) -> Piece | None:
        """The piece that an update makes; None while all of its text has to wait."""
        self.cached_tokens = update.cached_tokens
        self._prompt_logprobs = update.prompt_logprobs or self._prompt_logprobs
        if self._request.prompt_only:
            self.done = update.finish_reason is not None
            return self._piece("", "length", None) if self.done else None
        shown: list[str] = []
        last = len(update.token_ids) - 1
        for position, token_id in enumerate(update.token_ids):
            self._note(token_id, update, position)
            visible = not (update.stop_token and position == last) or self._request.include_stop
            text = self._detokenizer.feed(token_id) if visible else ""
            self._length += len(text)
            shown.append(self._scan(text))
            if self._scanner.hit is not None:
                self.done = True
                return self._piece("".join(shown), "stop", self._scanner.hit)
        if update.finish_reason is not None:
            self.done = True
            shown.append(self._scan(self._detokenizer.finish()))
            if self._scanner.hit is not None:
                return self._piece("".join(shown), "stop", self._scanner.hit)
            shown.append(self._scanner.finish())
            return self._piece("".join(shown), update.finish_reason, self._stop_token(update))
        text = "".join(shown)
        return self._piece(text, None, None) if text or self._prompt_logprobs else None

    def _scan(self, text: str) -> str:
        if self.completion_tokens <= self._request.sampling.min_tokens and self._request.sampling.min_tokens:
            return self._scanner.pass_through(text)
        return self._scanner.feed(text)

    def _note(self, token_id: int, update: Update, position: int) -> None:
        self.completion_tokens += 1
        self._token_ids.append(token_id)
        self._offsets.append(self._length)
        if update.logprobs:
            self._logprobs.append(update.logprobs[position])

    def _stop_token(self, update: Update) -> int | None:
        if not update.stop_token or not update.token_ids:
            return None
        return update.token_ids[-1]

    def _piece(self, text: str, finish_reason: str | None, stop_reason: str | int | None) -> Piece:
        piece = Piece(
            self.index, text, tuple(self._token_ids), tuple(self._logprobs), tuple(self._offsets),
            self._prompt_logprobs, finish_reason, stop_reason,
        )  # fmt: skip
        self._token_ids, self._logprobs, self._offsets, self._prompt_logprobs = [], [], [], ()
        return piece
