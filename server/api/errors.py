"""The one error type of the API, its JSON body, and how every failure of a request becomes it.

A message may repeat what the client sent, never what the server is: no path, address or traceback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from coserve.server.gateway.refusals import Conflict, Invalid, NotFound, QueueFull, Refused, Unavailable
from coserve.server.validation_words import reason_of

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}

_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "insufficient_permissions",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    429: "rate_limit_exceeded",
    431: "request_header_too_large",
    500: "internal_error",
    503: "engine_unavailable",
}


_REFUSALS: dict[type[Refused], int] = {Invalid: 400, NotFound: 404, Conflict: 409, QueueFull: 429, Unavailable: 503}
CLIENT_CLOSED_REQUEST = 499  # nobody is there to see it
# OpenAI's client repeats 409, 429 and 5xx by itself: of a conflict only another request can come right
_RETRY_HEADERS = {
    409: {"x-should-retry": "false"},
    429: {"retry-after-ms": "1000"},
    503: {"retry-after-ms": "2000"},
}


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class ApiError(HTTPException):
    """A failure with a status, a code that programs read, a message that people read and the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(int(status), message, dict(headers or {}))
        self.status = int(status)
        self.message = message
        self.code = code or _CODES.get(self.status, "error")
        self.param = param
        default = "invalid_request_error" if self.status < 500 else "server_error"
        self.type = type or _TYPES.get(HTTPStatus(self.status), default)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers or {}))


def invalid(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """400: the client sent something that can never be right."""
    return ApiError(400, message, code=code, param=param)


def unsupported(message: str, param: str) -> ApiError:
    """400: a known parameter with a value that this server does not serve."""
    return ApiError(400, message, code="unsupported_value", param=param)


def not_found(message: str, *, param: str | None = None, code: str = "not_found") -> ApiError:
    """404: it does not exist, or belongs to another tenant; the two look the same."""
    return ApiError(404, message, code=code, param=param)


def model_not_found(model: str) -> ApiError:
    return not_found(
        f"The model `{clip(model)}` does not exist or you do not have access to it; GET /v1/models lists yours.",
        param="model",
        code="model_not_found",
    )


def unavailable(message: str, retry_after_ms: int = 2000, *, code: str = "engine_unavailable") -> ApiError:
    """503: the server cannot do this now; the message says what is missing."""
    return ApiError(503, message, code=code, headers={"retry-after-ms": str(retry_after_ms)})


def storage_unavailable() -> ApiError:
    return unavailable("The server's storage is not available at the moment.", code="storage_unavailable")


def internal_error() -> ApiError:
    """500: says nothing of the cause; the log has it under the request id."""
    return ApiError(
        500, "The server had an error while processing your request; quote the x-request-id to its operator."
    )


def from_refusal(refused: Refused) -> ApiError:
    """The status that a refusal of the services behind the routes has."""
    status = next((status for kind, status in _REFUSALS.items() if isinstance(refused, kind)), 400)
    return ApiError(status, refused.message, code=refused.code, param=refused.param, headers=_RETRY_HEADERS.get(status))


def from_status(status: int, detail: str | None = None, headers: Mapping[str, str] | None = None) -> ApiError:
    """An error for a bare HTTP status, as frameworks raise it."""
    if status >= 500 or not detail:
        try:
            detail = HTTPStatus(status).phrase
        except ValueError:
            detail, status = "The request failed", 500
    return ApiError(status, detail, headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """400 for the first fault of a pydantic validation; `param` is its place, as `messages[0].content`."""
    return from_faults(error.errors(include_url=False, include_input=False))


def from_faults(faults: Sequence[Mapping[str, Any]], *, skip: int = 0) -> ApiError:
    """400 for the first of pydantic's faults, told in the words of this API; `skip` parts of its place are left out.

    A value that may be of several kinds has a fault for each. The one that looks deepest into it counts; those at
    the same place are told together.
    """
    places = [place(fault["loc"][skip:]) for fault in faults]
    inside = [one for one in places if re.match(rf"{re.escape(places[0])}([.\[]|$)", one)]
    param = max(inside, key=len)
    first = faults[places.index(param)]
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        param = place(first["loc"][skip:-1], key=str(first["loc"][-1]))
        return invalid(f"Unknown parameter: '{param}'.", param, code="unknown_parameter")
    reasons = [reason_of(fault) for fault, one in zip(faults, places, strict=True) if one == param]
    reasons = [reasons[0], *(reason.removeprefix("must be ") for reason in reasons[1:])]
    reason = " or ".join(dict.fromkeys(reasons))
    return invalid(f"Invalid value for '{param}': {reason}." if param else f"{reason}.", param or None)


def place(location: Sequence[str | int], *, key: str | None = None) -> str:
    """`("messages", 0, "content")` as `messages[0].content`; tags that pydantic adds for unions are left out.

    `key` comes last, whatever it looks like: a client's own word.
    """
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and not part.startswith(("list_", "constrained_", "function_")):
            if part in ("str", "int", "float", "bool", "none"):
                continue
            text += f".{part}" if text else part
    if key is not None:
        text += f".{key}" if text else key
    return clip(text)


def clip(text: str, limit: int = 120) -> str:
    """`text` fit to be repeated in a message: printable and short."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text[:limit])
    return clean + ("…" if len(text) > limit else "")
