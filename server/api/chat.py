"""`POST /v1/chat/completions`: messages in, an assistant's turn out, whole or as a stream of deltas."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from coserve.server.api.auth import Caller
from coserve.server.api.dependencies import ServicesOf, body_schema
from coserve.server.api.errors import clip, invalid, unsupported
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
from coserve.server.api.generation_params import MAX_TOP_LOGPROBS, GenerationFields
from coserve.server.api.usage_shape import chat_logprob, usage_json
from coserve.server.data.chat_template import ChatTemplateError
from coserve.server.data.messages import joined, template_role
from coserve.server.gateway.choice import GenerationRequest, Piece
from coserve.server.gateway.services import Services
from coserve.server.gateway.text import Chat, TextModel, TooLong
from coserve.server.store.ids import CHAT_COMPLETION, new_id
from coserve.server.store.usage import Usage

router = APIRouter(tags=["generation"])

# Names that a template already has a meaning for: a client's variables may not replace them.
_TEMPLATE_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)] | None, Field(union_mode="left_to_right")
    ] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatRequest(GenerationFields):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
async def create_chat_completion(request: Request, services: ServicesOf, principal: Caller) -> Response:
    """Generates the next turn of a conversation."""
    arrived = time.monotonic()
    fields = await read_fields(request, ChatRequest)
    if fields.top_logprobs and not fields.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    chat = _chat(fields)
    engine = require_engine(services, principal, fields.n or 1)
    adapter = await resolve_model(services, principal, fields.model)

    context = engine.max_model_len
    try:
        limit = context * (TRUNCATABLE if fields.truncate_prompt_tokens else 1)
        prompt = await services.text.encode_chat(chat, limit=limit)
    except ChatTemplateError as error:
        raise invalid(clip(str(error), 500), "messages") from None
    except TooLong as error:
        raise too_long(error, context, "messages") from None
    prompt = truncated(prompt, fields.truncate_prompt_tokens)
    if not prompt:
        raise invalid("The messages make an empty prompt; give one some content.", "messages")
    asked = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    max_tokens = completion_length(len(prompt), asked, None, context, "messages")

    generation = generation_request(
        services,
        principal,
        fields,
        engine,
        id=new_id(CHAT_COMPLETION),
        adapter=adapter,
        prompts=(prompt,),
        max_tokens=max_tokens,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        continues_prompt=bool(fields.continue_final_message),
    )
    shape = ChatShape(services, fields, generation, adapter.digest if adapter else engine.base_digest)
    return await answer(request, services, fields, generation, shape, arrived)


def _chat(fields: ChatRequest) -> Chat:
    """The template's input. Raises 400 for what only the route can refuse."""
    for name in fields.chat_template_kwargs or {}:
        if name in _TEMPLATE_NAMES or not name.isidentifier() or name.startswith("_"):
            raise invalid(f"'{clip(name, 40)}' cannot be a chat template variable.", "chat_template_kwargs")
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise invalid("'continue_final_message' excludes 'add_generation_prompt'.", "continue_final_message")
    return Chat(
        messages=render_messages(fields.messages),
        add_generation_prompt=not continues and fields.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=fields.chat_template_kwargs,
    )


def render_messages(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """Messages as templates know them. Raises 400 for content that is not text."""
    return tuple(_message(message, index) for index, message in enumerate(messages))


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    place = f"messages[{index}]"
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise unsupported("Tool calls and their results are not supported by this server.", place)
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text":
                raise unsupported(
                    f"Content of type '{clip(part.type, 40)}' is not supported: only 'text' is.",
                    f"{place}.content[{number}].type",
                )
            if part.text is None:
                raise invalid("A text part needs 'text'.", f"{place}.content[{number}].text")
        content = joined(part.text or "" for part in content)
    if content is None:
        raise invalid("A message needs 'content'.", f"{place}.content", code="missing_required_parameter")
    role = template_role(message.role)
    rendered = {"role": role, "content": content, "name": message.name, "reasoning_content": message.reasoning_content}
    return {key: value for key, value in rendered.items() if value is not None}


class ChatShape:
    """`chat.completion` and `chat.completion.chunk` objects of one request."""

    def __init__(self, services: Services, fields: ChatRequest, generation: GenerationRequest, digest: str) -> None:
        self._text: TextModel = services.text
        self._logprobs = bool(fields.logprobs)
        self._token_ids = bool(fields.return_token_ids)
        self._prompt = generation.prompts[0]
        self._begun: set[int] = set()
        self._head = {
            "id": generation.id,
            "created": int(time.time()),
            "model": fields.model,
            "system_fingerprint": f"fp_{digest[:12]}",
            **({"service_tier": fields.served_tier} if fields.served_tier else {}),
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if piece.index not in self._begun:
            begin = self._chunk(piece.index, {"role": "assistant", "content": ""}, None, None)
            if self._token_ids and not self._begun:
                begin["prompt_token_ids"] = list(self._prompt)
            self._begun.add(piece.index)
            chunks.append(begin)
        if piece.text or (piece.token_ids and (self._logprobs or self._token_ids)):
            chunks.append(self._chunk(piece.index, {"content": piece.text}, piece, None))
        if piece.finish_reason is not None:
            end = self._chunk(piece.index, {}, None, piece.finish_reason)
            end["choices"][0]["stop_reason"] = piece.stop_reason
            chunks.append(end)
        return chunks

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_json(usage)}

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        answer: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, own) for index, own in enumerate(pieces)],
            "usage": usage_json(usage),
        }
        if self._token_ids:
            answer["prompt_token_ids"] = list(self._prompt)
        return answer

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprob_content(pieces),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return choice

    def _chunk(self, index: int, delta: dict[str, Any], piece: Piece | None, finish: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprob_content([piece]) if piece else None,
            "finish_reason": finish,
        }
        if self._token_ids and piece:
            choice["token_ids"] = list(piece.token_ids)
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprob_content(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        entries = [chat_logprob(self._text, entry) for piece in pieces for entry in piece.logprobs]
        return {"content": entries, "refusal": None}
