"""Which fields of a generation request the warning header names: those that changed nothing though they might have."""

import pytest

from coserve.server.api.chat import ChatRequest
from coserve.server.api.generation_params import refuse_unsupported, warning_headers

BODY = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
SERVED = [
    {"tools": []}, {"tools": None}, {"tool_choice": "auto"}, {"tool_choice": "none"},
    {"response_format": {"type": "text"}}, {"modalities": ["text"]}, {"priority": 0}, {"functions": None},
    {"guided_json": {}}, {"user": "me", "metadata": {}, "store": False},
]  # fmt: skip


def headers(more):
    body = {**BODY, **more}
    refuse_unsupported(body)
    return warning_headers(ChatRequest.model_validate(body))


@pytest.mark.parametrize("more", SERVED, ids=str)
def test_what_is_served_as_asked_is_not_reported(more):
    assert headers(more) == {}
    assert headers({**more, "colour": 1}) == {"x-coserve-warning": "ignored unknown fields: colour"}


def test_many_and_strange_names_stay_a_header():
    warning = headers({f"field-{index:02}": 1 for index in range(12)} | {"a\r\nb": 1})["x-coserve-warning"]
    assert warning.startswith("ignored unknown fields: a??b, field-00") and warning.endswith(" and 3 more")
