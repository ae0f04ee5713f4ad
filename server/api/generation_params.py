"""The parameters that chat completions and completions share: their types and bounds, and what is not served.

Numbers are strict: a string is not a number, true is not 1. What depends on the model is checked where the
SamplingParams are made.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coserve.server.api.errors import clip, invalid, unsupported
from coserve.server.tenancy.principal import Principal
from coserve.server.tenancy.terms import MAX_TIMEOUT, TIERS, Promise, Terms, TooLong, TooTight
from coserve.server.wire.messages import EngineReady, SamplingParams

MAX_N = 64
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SLO_MS = 86_400_000.0  # a day
_INT64 = 2**63

Number = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]

# Known fields that change nothing here: accepted in silence.
_IRRELEVANT = frozenset({"store", "safety_identifier", "prompt_cache_key"})
# Known fields whose other values are refused: what comes past `refuse_unsupported` is what happens anyway.
_REFUSED_UNLESS_NULL = (
    "best_of", "suffix", "prompt_logprobs", "functions", "function_call", "web_search_options", "audio",
)  # fmt: skip
_REFUSED_UNLESS_EMPTY = (
    "tools", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip
_SERVED_AS_IS = frozenset(
    {*_REFUSED_UNLESS_NULL, *_REFUSED_UNLESS_EMPTY, "tool_choice", "modalities", "priority", "response_format"}
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class Slo(BaseModel):
    """What a request asks to be promised, in milliseconds: no less than its tenant is promised."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ttft_ms: Annotated[Number, Field(gt=0, le=MAX_SLO_MS)] | None = None
    itl_ms: Annotated[Number, Field(gt=0, le=MAX_SLO_MS)] | None = None


class GenerationFields(BaseModel):
    """Fields of both routes. Null means the default, as everywhere in this API."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None

    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None
    slo: Slo | None = None
    request_timeout_seconds: Annotated[Number, Field(gt=0, le=MAX_TIMEOUT)] | None = None

    # checked, and without effect here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_text(cls, value: Any) -> Any:
        """One message instead of pydantic's two, one for each member of the union."""
        stops = [value] if isinstance(value, str) else value
        if stops is None:
            return None
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("must be a string or a list of strings")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings are allowed")
        if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
        return stops

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def served_tier(self) -> str | None:
        """The tier that the answer names; None where the request did not ask for one."""
        if self.service_tier is None:
            return None
        return "flex" if TIERS[self.service_tier] == "batch" else "default"

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def ignored(self) -> list[str]:
        """Fields that the request had and nobody knows."""
        return sorted(set(self.model_extra or ()) - _IRRELEVANT - _SERVED_AS_IS)


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """400 `unsupported_value` for parameters that clients know and this server does not serve."""
    for name in _REFUSED_UNLESS_NULL:
        if body.get(name) is not None:
            raise unsupported(f"'{name}' is not supported by this server; leave it out.", name)
    for name in _REFUSED_UNLESS_EMPTY:
        if body.get(name) not in (None, [], {}):
            raise unsupported(f"'{name}' is not supported by this server; leave it out.", name)
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise unsupported("'tool_choice' other than 'none' is not supported by this server.", "tool_choice")
    if body.get("modalities") not in (None, ["text"]):
        raise unsupported("'modalities' other than ['text'] are not supported by this server.", "modalities")
    if body.get("priority") not in (None, 0):
        raise unsupported("'priority' other than 0 is not supported by this server.", "priority")
    response_format = body.get("response_format")
    if response_format is not None:
        kind = response_format.get("type") if isinstance(response_format, dict) else None
        if not isinstance(kind, str):
            raise invalid("'response_format' must be an object with a 'type'.", "response_format")
        if kind != "text":
            raise unsupported(
                f"'response_format' of type '{clip(kind)}' is not supported: use 'text'.", "response_format"
            )


def warning_headers(fields: GenerationFields) -> dict[str, str]:
    """A header that names fields which were ignored."""
    if not fields.ignored:
        return {}
    names = ", ".join(_header_safe(name) for name in fields.ignored[:10])
    more = f" and {len(fields.ignored) - 10} more" if len(fields.ignored) > 10 else ""
    return {"x-coserve-warning": f"ignored unknown fields: {names}{more}"}


def _header_safe(name: str) -> str:
    return "".join(character if "!" <= character <= "~" else "?" for character in name[:64])


def promise(fields: GenerationFields, terms: Terms, principal: Principal, engine: EngineReady) -> Promise:
    """What the request is promised. Raises 400 if it asks for more than its tenant has."""
    slo = fields.slo or Slo()
    tier = fields.service_tier or "auto"
    try:
        return terms.promise(principal.tenant_name, engine, TIERS[tier], slo.ttft_ms, slo.itl_ms)
    except TooTight as error:
        raise invalid(
            f"'slo.{error.field}' is {error.asked:g} ms, tighter than the {error.least:g} ms that you are promised in "
            f"the service tier '{tier}'; ask for as much or more, or leave it out.",
            f"slo.{error.field}",
        ) from None


def timeout(fields: GenerationFields, terms: Terms, principal: Principal) -> float | None:
    """Seconds after which the request is ended; None: never. Raises 400 if it asks for more than its tenant has."""
    name, asked = "request_timeout_seconds", fields.request_timeout_seconds
    try:
        return terms.timeout(principal.tenant_name, asked)
    except TooLong as error:
        raise invalid(
            f"'{name}' is {asked:g}, and your requests have {error.most:g} s at most; ask for as much or less, or "
            "leave it out.",
            name,
        ) from None


def sampling_params(
    fields: GenerationFields,
    *,
    max_tokens: int,
    stop_ids: frozenset[int],
    vocab_size: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """How choice 0 is sampled; `stop_ids` end an answer unless `ignore_eos`. Raises 400 for unknown token ids."""
    if (fields.min_tokens or 0) > max_tokens:
        raise invalid(f"'min_tokens' is {fields.min_tokens}, above the {max_tokens} tokens there may be.", "min_tokens")
    top_p = 1.0 if fields.top_p is None else fields.top_p
    own_stops = check_ids(fields.stop_token_ids or [], vocab_size, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed % _INT64,
        min_tokens=fields.min_tokens or 0,
        temperature=1.0 if fields.temperature is None else float(fields.temperature),
        top_p=max(float(top_p), 1e-9),  # 0 asks for the likeliest token alone
        top_k=max(fields.top_k or 0, 0),
        min_p=float(fields.min_p or 0.0),
        presence_penalty=float(fields.presence_penalty or 0.0),
        frequency_penalty=float(fields.frequency_penalty or 0.0),
        repetition_penalty=1.0 if fields.repetition_penalty is None else float(fields.repetition_penalty),
        logit_bias=_logit_bias(fields.logit_bias or {}, vocab_size),
        stop_token_ids=tuple(sorted({*own_stops, *(() if fields.ignore_eos else stop_ids)})),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_ids(ids: list[int], vocab_size: int, param: str) -> tuple[int, ...]:
    """The ids, all inside the vocabulary; else 400."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise invalid(f"'{param}[{position}]' is {str(token_id)[:40]}: token ids are 0 to {vocab_size - 1}.", param)
    return tuple(ids)


def _logit_bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise invalid(
                f"'logit_bias' has the key '{clip(key, 40)}': keys are token ids, 0 to {vocab_size - 1}.", "logit_bias"
            )
        bias[int(key)] = float(value)
    return bias
