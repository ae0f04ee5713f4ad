"""The steps that both generation routes take: which model, how long, into the engine, and out as JSON or as events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response

from coserve.server.api.dependencies import read_json, validated
from coserve.server.api.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    from_refusal,
    internal_error,
    invalid,
    model_not_found,
)
from coserve.server.api.generation_params import (
    GenerationFields,
    promise,
    refuse_unsupported,
    sampling_params,
    timeout,
    warning_headers,
)
from coserve.server.gateway.choice import GenerationRequest, Piece
from coserve.server.gateway.disconnects import ClientGone, while_connected
from coserve.server.gateway.engine_sequence import SequenceFailed
from coserve.server.gateway.generation import Generation
from coserve.server.gateway.refusals import Refused
from coserve.server.gateway.services import Services
from coserve.server.gateway.sse import DONE, KEEPALIVE, EventStream, comment, event
from coserve.server.gateway.text import TooLong
from coserve.server.store.usage import Usage
from coserve.server.tenancy.principal import Principal
from coserve.server.wire.messages import DEADLINE_EXCEEDED, AdapterRef, EngineReady

log = logging.getLogger("coserve.generation")

F = TypeVar("F", bound=GenerationFields)

TRUNCATABLE = 16  # contexts: a longer prompt is refused even where it would be cut, before it costs seconds of CPU

# What the engine may say of a sequence: the status, and a text where the engine's own is not for clients.
_FAILURES: dict[str, tuple[int, str | None]] = {
    "adapter_invalid": (400, None),
    "context_length_exceeded": (400, None),
    "invalid_value": (400, None),
    "model_not_found": (404, None),
    DEADLINE_EXCEEDED: (408, None),
    "engine_restarted": (503, "The engine restarted while this request was running; send it again."),
    "engine_crashed": (
        500,
        "The engine was lost three times while it had this request, which is not sent to it again; if it fails alone "
        "too, quote the x-request-id to the server's operator.",
    ),
    "engine_unavailable": (503, "The engine is not available; try again in a moment."),
    "draining": (503, "The server shut down before this request could finish; send it again."),
    "adapter_unavailable": (503, "The model's adapter could not be loaded; try again in a moment."),
    "out_of_memory": (503, "The engine had no memory left for this request; try again, or with fewer tokens."),
}


class Shape(Protocol):
    """The JSON of one route's answers."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The stream's chunks that a piece makes."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]: ...

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """The plain answer; `pieces[i]` are all pieces of choice i."""


def require_engine(services: Services, principal: Principal, sequences: int) -> EngineReady:
    """What the engine said of itself; raises 503 or 429 if this many sequences cannot wait for it now."""
    try:
        services.generation.admission.check(principal.tenant, sequences)
    except Refused as refused:
        services.metrics.refused()
        raise from_refusal(refused) from None
    engine = services.engine.known
    if engine is None:
        raise RuntimeError("work was admitted before any engine was known")
    return engine


async def resolve_model(services: Services, principal: Principal, model: str) -> AdapterRef | None:
    """The adapter version that answers for `model` from now on, None for the base. Raises 404."""
    if model == services.settings.base_model_id:
        return None
    resolved = await services.store.models.resolve(principal.tenant, model, project=principal.tenant_name)
    if resolved is None:
        raise model_not_found(model)
    return AdapterRef(resolved.digest, resolved.path)


def truncated(ids: tuple[int, ...], keep: int | None) -> tuple[int, ...]:
    return ids if keep is None else ids[-keep:]


def completion_length(prompt_tokens: int, asked: int | None, default: int | None, context: int, param: str) -> int:
    """How many tokens may be made; `default` None is all that the context leaves. Raises 400 if it has no room."""
    left = context - prompt_tokens
    if asked is None:
        if left < 1:
            raise context_exceeded(context, f"{prompt_tokens}", prompt_tokens + 1, 1, param)
        return left if default is None else min(default, left)
    if asked > left:
        raise context_exceeded(context, f"{prompt_tokens}", prompt_tokens + asked, asked, param)
    return asked


def context_exceeded(context: int, prompt: str, total: int, completion: int, param: str) -> ApiError:
    return invalid(
        f"This model's maximum context length is {context} tokens. However, you requested {total} tokens "
        f"({prompt} in the prompt, {completion} for the completion). Please shorten the prompt or ask for less.",
        param,
        code="context_length_exceeded",
    )


def too_long(error: TooLong, context: int, param: str) -> ApiError:
    return context_exceeded(context, f"at least {error.at_least}", error.at_least, 0, param)


def failure(failed: SequenceFailed) -> ApiError:
    """The error of a sequence that ended without a result."""
    if failed.code not in _FAILURES:
        log.error("the engine failed a sequence: %s: %s", failed.code, failed.message)
        return internal_error()
    status, text = _FAILURES[failed.code]
    headers = {"retry-after-ms": "1000"} if status == 503 else None
    if failed.code in ("engine_crashed", DEADLINE_EXCEEDED):
        headers = {"x-should-retry": "false"}  # OpenAI's client would send it again by itself
    return ApiError(status, text or failed.message, code=failed.code, headers=headers)


async def read_fields(request: Request, model: type[F]) -> F:
    """The request's body as `model`; 400 for what is malformed, out of range or not served."""
    body = await read_json(request)
    refuse_unsupported(body)
    return validated(model, body)


def generation_request(
    services: Services,
    principal: Principal,
    fields: GenerationFields,
    engine: EngineReady,
    *,
    id: str,
    adapter: AdapterRef | None,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    continues_prompt: bool,
    prompt_only: bool = False,
) -> GenerationRequest:
    """What both routes ask of the engine in the same way. Raises 400 for token ids outside the vocabulary."""
    return GenerationRequest(
        id=id,
        tenant=principal.tenant,
        salt=principal.salt + "/" + (fields.cache_salt or ""),
        model=fields.model,
        adapter=adapter,
        prompts=tuple(prompts),
        n=fields.n or 1,
        sampling=sampling_params(
            fields,
            max_tokens=max_tokens,
            stop_ids=services.text.tokenizer.stop_ids,
            vocab_size=engine.vocab_size,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        ),
        promise=promise(fields, services.terms, principal, engine),
        share=services.terms.share(principal.tenant_name),
        timeout=timeout(fields, services.terms, principal),
        stop=fields.stops,
        include_stop=bool(fields.include_stop_str_in_output),
        skip_special=fields.skip_special_tokens is not False,
        continues_prompt=continues_prompt,
        prompt_only=prompt_only,
    )


async def answer(
    request: Request,
    services: Services,
    fields: GenerationFields,
    generation_request: GenerationRequest,
    shape: Shape,
    arrived: float,
) -> Response:
    """Runs a request to its end for as long as the client is there."""
    service = services.generation
    headers = warning_headers(fields)
    try:
        generation = service.start(generation_request, arrived)
    except Refused as refused:
        services.metrics.refused()
        raise from_refusal(refused) from None
    keepalive = services.settings.keepalive_seconds
    try:
        if fields.stream:
            # The first news decides between an error's status and a stream; a long queue begins it with a heartbeat.
            first = await while_connected(request.receive, generation.next(keepalive))
            chunks = _events(services, generation, shape, first, fields.include_usage)
            return EventStream(chunks, lambda: service.drop(generation), headers)
        pieces = await while_connected(request.receive, _all_pieces(generation, keepalive))
    except ClientGone:
        service.drop(generation)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except SequenceFailed as failed:
        service.drop(generation)
        raise failure(failed) from None
    except BaseException:
        service.drop(generation)
        raise
    await service.finish(generation)
    return JSONResponse(shape.whole(pieces, generation.usage), headers=headers)


async def _all_pieces(generation: Generation, timeout: float) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in generation.choices]
    while not generation.done:
        for piece in await generation.next(timeout):
            pieces[piece.index].append(piece)
    return pieces


def _heartbeat(services: Services, generation: Generation) -> bytes:
    """A comment that tells who waits where it stands."""
    if generation.first_token_at is None:
        for waiting in services.engine.queue(generation.request.tenant):
            if waiting.position is not None and waiting.request_id.startswith(f"{generation.request.id}/"):
                wait = "" if waiting.seconds is None else f", about {waiting.seconds:.1f} s"
                return comment(f"keepalive: position {waiting.position} in the queue{wait}; {waiting.reason}")
    return KEEPALIVE


async def _events(
    services: Services, generation: Generation, shape: Shape, first: list[Piece], include_usage: bool
) -> AsyncGenerator[bytes, None]:
    nothing: dict[str, Any] = {"usage": None} if include_usage else {}
    try:
        pieces = first
        while True:
            chunks = [event({**chunk, **nothing}) for piece in pieces for chunk in shape.chunks(piece)]
            yield b"".join(chunks) if chunks else _heartbeat(services, generation)
            if generation.done:
                break
            pieces = await generation.next(services.settings.keepalive_seconds)
        await services.generation.finish(generation)
        yield (event(shape.usage_chunk(generation.usage)) if include_usage else b"") + DONE
    except SequenceFailed as failed:
        yield event(failure(failed).body())
    except Exception:
        # a stream that merely stopped would look complete to the client
        log.exception("the stream of %s failed", generation.request.id)
        yield event(internal_error().body())
