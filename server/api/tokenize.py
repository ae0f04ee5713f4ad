"""`POST /tokenize` and `/detokenize`: the model's tokenizer, without the model."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from coserve.server.api.auth import Caller
from coserve.server.api.chat import ChatMessage, render_messages
from coserve.server.api.dependencies import ServicesOf, body_schema, read_json, validated
from coserve.server.api.errors import clip, invalid
from coserve.server.api.generating import resolve_model
from coserve.server.api.generation_params import check_ids
from coserve.server.data.chat_template import ChatTemplateError
from coserve.server.gateway.text import Chat

router = APIRouter(tags=["generation"])


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


@router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
async def tokenize(request: Request, services: ServicesOf, principal: Caller) -> dict[str, Any]:
    """Token ids of a text, or of a chat as its template renders it."""
    fields = validated(TokenizeRequest, await read_json(request))
    if fields.model is not None:
        await resolve_model(services, principal, fields.model)
    text = services.text
    if (fields.prompt is None) == (fields.messages is None):
        raise invalid("Give either 'prompt' or 'messages'.", "prompt")
    if fields.messages is not None:
        chat = Chat(render_messages(fields.messages), add_generation_prompt=fields.add_generation_prompt is not False)
        try:
            ids = await text.encode_chat(chat)
        except ChatTemplateError as error:
            raise invalid(clip(str(error), 500), "messages") from None
    else:
        ids = await text.encode(fields.prompt or "", add_special_tokens=fields.add_special_tokens is not False)
    engine = services.engine.known
    return {
        "tokens": list(ids),
        "count": len(ids),
        "max_model_len": engine.max_model_len if engine else None,
        "token_strs": [text.tokenizer.id_to_token(id_) for id_ in ids] if fields.return_token_strs else None,
    }


@router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
async def detokenize(request: Request, services: ServicesOf, principal: Caller) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    fields = validated(DetokenizeRequest, await read_json(request))
    if fields.model is not None:
        await resolve_model(services, principal, fields.model)
    ids = await run_in_threadpool(check_ids, fields.tokens, services.text.tokenizer.vocab_size, "tokens")
    return {"prompt": await services.text.decode(ids, skip_special_tokens=False)}
