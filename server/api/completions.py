"""`POST /v1/completions`: text or token ids in, the text that goes on from them out, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf, body_schema
from coserve.server.api.errors import invalid
from coserve.server.api.generating import (
    TRUNCATABLE,
    answer,
    completion_length,
    generation_request,
    read_fields,
    require_engine,
    resolve_model,
    too_long,
    truncated,
)
from coserve.server.api.generation_params import MAX_TOP_LOGPROBS, GenerationFields, check_ids
from coserve.server.api.usage_shape import finite, token_label, usage_json
from coserve.server.gateway.choice import GenerationRequest, Piece
from coserve.server.gateway.services import Services
from coserve.server.gateway.text import TextModel, TooLong
from coserve.server.store.ids import COMPLETION, new_id
from coserve.server.store.usage import Usage
from coserve.server.wire.messages import EngineReady, TokenLogprob

router = APIRouter(tags=["generation"])

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256


class CompletionRequest(GenerationFields):
    prompt: Any = Field(description="a string, a list of strings, a list of token ids, or a list of such lists")
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    text: str  # as echo shows it


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
async def create_completion(request: Request, services: ServicesOf, principal: Caller) -> Response:
    """Continues one prompt, or several."""
    arrived = time.monotonic()
    fields = await read_fields(request, CompletionRequest)
    given = _prompts(fields.prompt)
    echo = bool(fields.echo)
    if fields.max_tokens == 0 and not echo:
        raise invalid("'max_tokens' is 0: only 'echo' can be answered without making a token.", "max_tokens")
    engine = require_engine(services, principal, len(given) * (fields.n or 1))
    adapter = await resolve_model(services, principal, fields.model)
    prompts = [await _prompt(services, fields, engine, one, position) for position, one in enumerate(given)]

    prompt_only = fields.max_tokens == 0
    lengths = [
        completion_length(
            len(prompt.ids), 1 if prompt_only else fields.max_tokens, DEFAULT_MAX_TOKENS, engine.max_model_len, "prompt"
        )
        for prompt in prompts
    ]
    generation = generation_request(
        services,
        principal,
        fields,
        engine,
        id=new_id(COMPLETION),
        adapter=adapter,
        prompts=[prompt.ids for prompt in prompts],
        max_tokens=min(lengths),
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if echo else None,
        continues_prompt=True,
        prompt_only=prompt_only,
    )
    shape = CompletionShape(services, fields, generation, prompts, adapter.digest if adapter else engine.base_digest)
    return await answer(request, services, fields, generation, shape, arrived)


def _prompts(given: Any) -> list[str | list[int]]:
    """The prompts in `prompt`, each as text or as ids. Raises 400."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise invalid("'prompt' must be a string, a list of strings, token ids or lists of token ids.", "prompt")
    if all(type(one) is int for one in given):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise invalid(f"'prompt' has {len(given)} prompts; at most {MAX_PROMPTS} are allowed.", "prompt")
    for position, one in enumerate(given):
        ids = isinstance(one, list) and bool(one) and all(type(token_id) is int for token_id in one)
        if not ids and not isinstance(one, str):
            raise invalid(f"'prompt[{position}]' must be a string or a list of token ids.", f"prompt[{position}]")
    return given


async def _prompt(
    services: Services, fields: CompletionRequest, engine: EngineReady, given: str | list[int], position: int
) -> Prompt:
    keep = fields.truncate_prompt_tokens
    if isinstance(given, str):
        try:
            limit = engine.max_model_len * (TRUNCATABLE if keep else 1)
            special = fields.add_special_tokens is not False
            whole = await services.text.encode(given, add_special_tokens=special, limit=limit)
        except TooLong as error:
            raise too_long(error, engine.max_model_len, "prompt") from None
    else:
        if len(given) > engine.max_model_len * (TRUNCATABLE if keep else 1):
            raise too_long(TooLong(len(given)), engine.max_model_len, "prompt")
        whole = check_ids(given, engine.vocab_size, f"prompt[{position}]" if position else "prompt")
    ids = truncated(whole, keep)
    if not ids:
        raise invalid(
            "'prompt' is empty: this model puts no token before a text, so there is nothing to go on.", "prompt"
        )
    if not fields.echo:
        return Prompt(ids, "")
    if isinstance(given, str) and len(ids) == len(whole):
        return Prompt(ids, given)
    return Prompt(ids, await services.text.decode(ids, skip_special_tokens=fields.skip_special_tokens is not False))


class CompletionShape:
    """`text_completion` objects of one request."""

    def __init__(
        self,
        services: Services,
        fields: CompletionRequest,
        generation: GenerationRequest,
        prompts: Sequence[Prompt],
        digest: str,
    ) -> None:
        self._text: TextModel = services.text
        self._generation = generation
        self._prompts = prompts
        self._echo = bool(fields.echo)
        self._top = fields.logprobs
        self._token_ids = bool(fields.return_token_ids)
        self._begun: set[int] = set()
        self._head = {
            "id": generation.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": fields.model,
            "system_fingerprint": f"fp_{digest[:12]}",
            **({"service_tier": fields.served_tier} if fields.served_tier else {}),
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        return [{**self._head, "choices": [self._choice(piece.index, [piece], first)]}]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage_json(usage)}

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, own, True) for index, own in enumerate(pieces)]
        return {**self._head, "choices": choices, "usage": usage_json(usage)}

    def _choice(self, index: int, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        prompt = self._prompts[index // self._generation.n]
        echoed = self._echo and first
        choice: dict[str, Any] = {
            "index": index,
            "text": (prompt.text if echoed else "") + "".join(piece.text for piece in pieces),
            "logprobs": None if self._top is None else self._logprobs(prompt, pieces, echoed),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
            choice["prompt_token_ids"] = list(prompt.ids) if first else None
        return choice

    def _logprobs(self, prompt: Prompt, pieces: Sequence[Piece], echoed: bool) -> dict[str, Any]:
        entries: list[tuple[int, TokenLogprob | None, int]] = []  # id, what the model thought of it, offset
        if echoed:
            known = next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs), ())
            entries += zip(
                prompt.ids, [*known, *[None] * (len(prompt.ids) - len(known))], self._offsets(prompt), strict=True
            )
        shift = len(prompt.text)
        for piece in pieces:
            for entry, offset in zip(piece.logprobs, piece.offsets, strict=True):
                entries.append((entry.token_id, entry, offset + shift))
        return {
            "tokens": [token_label(self._text, token_id) for token_id, _, _ in entries],
            "token_logprobs": [finite(entry.logprob) if entry else None for _, entry, _ in entries],
            "top_logprobs": [self._alternatives(entry) for _, entry, _ in entries] if self._top else None,
            "text_offset": [offset for _, _, offset in entries],
        }

    def _alternatives(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        """The likeliest tokens, and the one that was taken, by text; of two with one text the likelier stands."""
        if entry is None:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in [*entry.top, (entry.token_id, entry.logprob)]:
            found.setdefault(token_label(self._text, token_id), finite(logprob))
        return found

    def _offsets(self, prompt: Prompt) -> list[int]:
        detokenizer = self._text.detokenizer(self._generation.skip_special)
        offsets, length = [], 0
        for token_id in prompt.ids:
            offsets.append(length)
            length += len(detokenizer.feed(token_id))
        return offsets
