"""What a value must be, told in one way on the command line, in settings and in the API. Pure, and knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def reason_of(fault: Mapping[str, Any]) -> str:
    """What a value must be, from one of `ValidationError.errors()`; pydantic's own sentence for a kind not known."""
    known, limits = _KINDS.get(fault["type"]), fault.get("ctx", {})
    if known is None:
        return str(fault["msg"]).removeprefix("Value error, ").rstrip(".")
    if limits.get("min_length") == 1:
        return "must not be empty"
    return known.format_map({name: _plain(value) for name, value in limits.items()})


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
