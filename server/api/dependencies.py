"""What route functions ask for: the services, and a JSON body that was checked before anything looks into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from coserve.server.api.errors import clip, from_validation, invalid
from coserve.server.data.strict_json import MOST_PARTS, DuplicateKey, too_many_parts, unique_keys
from coserve.server.gateway.services import Services

_DEPTH = 64
_LARGE_BODY = 64 * 1024

T = TypeVar("T", bound=BaseModel)


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(services_of)]


async def read_json(request: Request) -> dict[str, Any]:
    """The request's body, a JSON object. Raises 400 for anything that is not strict JSON of sane depth."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise invalid("The body must be JSON: send `Content-Type: application/json`.", code="invalid_content_type")
    body = await request.body()
    if len(body) > _LARGE_BODY:
        return await run_in_threadpool(parse_json, body)
    return parse_json(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """Strict JSON: an object, no key twice, no NaN or Infinity, no NUL, no lone surrogate, nested at most 64 deep."""
    if not body.strip():
        raise invalid("The body is empty: send a JSON object.", code="invalid_json")
    if too_many_parts(body):
        raise invalid(f"The body has more than {MOST_PARTS} objects, arrays and keys.", code="invalid_json")
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise invalid("The body is not UTF-8.", code="invalid_json") from None
    except DuplicateKey as error:
        raise invalid(
            f"An object of the body has '{clip(str(error))}' twice; give it once.", code="invalid_json"
        ) from None
    except json.JSONDecodeError as error:
        raise invalid(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", code="invalid_json"
        ) from None
    except RecursionError:
        raise invalid(f"The body is nested deeper than {_DEPTH}.", code="invalid_json") from None
    except ValueError as error:  # from _no_constant, or an integer of thousands of digits
        raise invalid(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    _check_depth(value)
    if "\\u" in text:
        _check_strings(value)
    return value


def validated(model: type[T], body: dict[str, Any]) -> T:
    """`body` as `model`; a fault becomes a 400 that names the first bad field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` for a route that reads its body itself."""
    schema = model.model_json_schema()
    content = {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with each definition where it is used: `#/$defs/…` means nothing inside an OpenAPI document."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise invalid(f"The body is nested deeper than {_DEPTH}.", code="invalid_json")


def _check_strings(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if type(item) is dict:
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif type(item) is list:
            waiting.extend(item)
        elif type(item) is str:
            if "\0" in item:
                raise invalid("The body has a string with a NUL character.", code="invalid_json")
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise invalid("The body has a string with half of a surrogate pair.", code="invalid_json") from None
