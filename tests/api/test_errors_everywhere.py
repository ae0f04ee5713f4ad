"""Whatever is wrong with a request, the answer is the error object, quickly, and the engine hears nothing of it."""

import gzip
import json
import time

import pytest
from scripted_engine import in_world

from coserve.server.wire.messages import Generate

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "base", "prompt": "hi"}


def assert_error(answer, status, code=None, param=None):
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    if code is not None:
        assert body["error"]["code"] == code, body
    if param is not None:
        assert body["error"]["param"] == param, body
    return body["error"]


def test_unknown_paths_and_methods(tmp_path):
    async def scenario(world):
        assert_error(await world.a.get("/v1/nothing"), 404, "unknown_url")
        assert_error(await world.a.get("/v1/models/"), 404)
        assert_error(await world.a.get("/v1/models/no/such:model"), 404, "model_not_found", "model")
        error = await world.a.get("/v1/chat/completions")
        assert_error(error, 405, "method_not_allowed")
        assert error.headers["allow"] == "POST"
        assert_error(await world.a.request("PATCH", "/healthz"), 405)
        assert_error(await world.a.get("/v1/fine_tuning/jobs?limit=many"), 400, param="limit")

    in_world(tmp_path, scenario)


BROKEN_BODIES = {
    "empty": b"",
    "not JSON": b"{model: base}",
    "cut": b'{"model": "base", "messages": [',
    "an array": b"[]",
    "a number": b"12",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "rather deep": b'{"model":"base","messages":[{"role":"user","content":"x"}],"x":' + b"[" * 500 + b"]" * 500 + b"}",
    "NUL": b'{"model": "base\x00"}',
    "escaped NUL": b'{"model": "base", "messages": [{"role": "user", "content": "a\\u0000b"}]}',
    "lone surrogate": b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "lone surrogate in a key": b'{"model": "base", "\\udfff": 1}',
    "NaN": b'{"model": "base", "temperature": NaN}',
    "infinity": b'{"model": "base", "temperature": -Infinity}',
    "a long integer": b'{"model": "base", "seed": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"model": "base", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "model": "base"}',
    "a key twice inside": b'{"model": "base", "messages": [{"role": "user", "role": "system", "content": "b"}]}',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "base"}'.encode("utf-16"),
}


def test_broken_bodies_are_400_at_once(tmp_path):
    async def scenario(world):
        headers = {"content-type": "application/json"}
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/fine_tuning/jobs"):
            for name, body in BROKEN_BODIES.items():
                started = time.process_time()
                answer = await world.a.post(path, content=body, headers=headers)
                seconds = time.process_time() - started
                assert_error(answer, 400)
                assert seconds < 0.5, (name, seconds)  # of a core; the promise is 0.05 s
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = await world.a.post(
                "/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": content_type}
            )
            assert_error(answer, 400, "invalid_content_type")
        assert not world.engine.of(Generate)

    in_world(tmp_path, scenario)


BAD_CHAT = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, 7]}]}, "messages[0].content[1]"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10**40]}, "stop_token_ids"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"١": 1}}, "logit_bias"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 5}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"user": 5}, "user"),
    ({"metadata": "x"}, "metadata"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]

UNSUPPORTED = [
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tools": "x"},
    {"tool_choice": "required"},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    {"best_of": 2},
    {"suffix": "end"},
    {"prompt_logprobs": 1},
    {"structured_outputs": {"regex": "(a+)+"}},
    {"guided_json": {"type": "object"}},
    {"priority": 3},
]

BAD_TOKENIZE = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
    ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "ab"}, "tokens"),
    ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [10**400]}, "tokens"),
]

# What is expected is said in the words of the API, all of it where a value may be of several kinds.
TOLD = [
    ({"messages": 5}, "Invalid value for 'messages': must be a list."),
    ({"messages": []}, "Invalid value for 'messages': must not be empty."),
    ({"messages": [5]}, "Invalid value for 'messages[0]': must be an object."),
    (
        {"messages": [{"role": "user", "content": {}}]},
        "Invalid value for 'messages[0].content': must be a string or a list.",
    ),
    ({"n": 65}, "Invalid value for 'n': must be at most 64."),
    ({"n": "1"}, "Invalid value for 'n': must be a whole number."),
    ({"temperature": True}, "Invalid value for 'temperature': must be a number."),
    ({"stream": 1}, "Invalid value for 'stream': must be true or false."),
    ({"stop": 5}, "Invalid value for 'stop': must be a string or a list of strings."),
]  # fmt: skip

BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [5.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", 5]}, "prompt[1]"),
    ({"prompt": [5, "a"]}, "prompt[0]"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [[5], [10**30]]}, "prompt[1]"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
]


def test_bad_parameters_are_named(tmp_path):
    async def scenario(world):
        for change, param in BAD_CHAT:
            body = json.dumps({**CHAT, **change}).replace("Infinity", "1e999")
            answer = await world.a.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert_error(answer, 400, param=param)
        for change, param in BAD_COMPLETIONS:
            assert_error(await world.a.post("/v1/completions", json={**COMPLETION, **change}), 400, param=param)
        for path, body, param in BAD_TOKENIZE:
            assert_error(await world.a.post(path, json=body), 400, param=param)
            missing = {"prompt": "a", "tokens": [5], "model": "nobodys"}
            assert_error(await world.a.post(path, json=missing), 404, "model_not_found", "model")
        for change, told in TOLD:
            answer = await world.a.post("/v1/chat/completions", json={**CHAT, **change})
            assert assert_error(answer, 400)["message"] == told
        for change in UNSUPPORTED:
            for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
                answer = await world.a.post(path, json={**body, **change})
                assert_error(answer, 400, "unsupported_value", next(iter(change)))
        assert not world.engine.of(Generate)

    in_world(tmp_path, scenario)


def test_null_is_the_default_everywhere(tmp_path):
    async def scenario(world):
        nothing = dict.fromkeys(("add_special_tokens", "add_generation_prompt", "return_token_strs", "model"))
        assert (await world.a.post("/tokenize", json={"prompt": "hi", **nothing})).status_code == 200
        answer = await world.a.post(
            "/v1/completions", json={**COMPLETION, "n": 65, "stream_options": {"include_usage": None}}
        )
        assert_error(answer, 400, param="n")

    in_world(tmp_path, scenario)


def test_what_the_framework_answers_in_plain_text_is_the_error_object_too(tmp_path):
    async def scenario(world):
        url = f"/v1/files/{await world.upload()}/content"
        assert (await world.a.get(url, headers={"range": "bytes=0-3"})).status_code == 206
        beyond = await world.a.get(url, headers={"range": "bytes=99999999-"})
        assert_error(beyond, 416, "range_not_satisfiable")
        assert beyond.headers["content-range"].startswith("bytes */")
        for given in ("bytes=x", "bytes", "items=0-1", "bytes=5-2"):
            assert_error(await world.a.get(url, headers={"range": given}), 400)

    in_world(tmp_path, scenario)


def test_unknown_models(tmp_path):
    async def scenario(world):
        for model in ("nothing", "ft:base:x:y:z", "base@0123456789ab", "../base", "base\n", "adapter-" + "0" * 22):
            answer = await world.a.post("/v1/completions", json={**COMPLETION, "model": model})
            assert_error(answer, 404, "model_not_found", "model")

    in_world(tmp_path, scenario)


def test_the_context_is_not_exceeded(tmp_path):
    async def scenario(world):  # the scripted engine's context is 256 tokens
        error = assert_error(
            await world.a.post("/v1/completions", json={**COMPLETION, "prompt": [5] * 250, "max_tokens": 7}),
            400, "context_length_exceeded", "prompt",
        )  # fmt: skip
        assert "256" in error["message"] and "257" in error["message"]
        for text in ("x" * 300, "word " * 200_000):
            started = time.process_time()
            answer = await world.a.post(
                "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": text}]}
            )
            error = assert_error(answer, 400, "context_length_exceeded", "messages")
            assert "256" in error["message"]
            assert time.process_time() - started < 1
        assert not world.engine.of(Generate)

    in_world(tmp_path, scenario)


def test_sizes(tmp_path):
    async def scenario(world):
        answer = await world.a.post(
            "/v1/completions", content=b" " * 5000, headers={"content-type": "application/json"}
        )
        assert_error(answer, 413, "request_too_large")

        async def chunks():
            for _ in range(5):
                yield b" " * 1000

        answer = await world.a.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
        assert_error(answer, 413, "request_too_large")
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await world.a.post("/v1/completions", content=gzip.compress(b"{}"), headers=packed)
        assert "gzip" in assert_error(answer, 415, "unsupported_media_type")["message"]
        answer = await world.a.post("/v1/completions", content=b" ", headers={"content-type": "application/json"})
        assert "empty" in assert_error(answer, 400, "invalid_json")["message"]
        assert_error(await world.a.get("/v1/models", headers={"x-long": "y" * 3000}), 431)
        assert_error(await world.a.get("/v1/models?x=" + "y" * 3000), 431)

    in_world(tmp_path, scenario, max_body="4000", max_header="2000")


MANY = 400_000
CROWDED = {  # path, body: each took the parser or the checks seconds, in which nobody else was served
    "messages that are none": ("/v1/chat/completions", {**CHAT, "messages": [5] * MANY}),
    "parts that are none": (
        "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [5] * MANY}]},
    ),
    "ids that are none": ("/detokenize", {"tokens": ["a"] * MANY}),
    "stops that are none": ("/v1/completions", {**COMPLETION, "stop_token_ids": ["a"] * MANY}),
    "modules that are none": (
        "/v1/fine_tuning/jobs", {"model": "base", "training_file": "x", "adapter": {"target_modules": [5] * MANY}},
    ),
    "brackets": ("/v1/completions", {**COMPLETION, "x": [[[]]] * MANY}),
    "keys": ("/v1/fine_tuning/jobs", {f"k{number}": 1 for number in range(MANY)}),
    "ids of a prompt": ("/v1/completions", {**COMPLETION, "prompt": [5] * MANY}),
}  # fmt: skip


def test_a_crowded_body_costs_a_moment_not_everybodys_seconds(tmp_path):
    async def scenario(world):
        for name, (path, body) in CROWDED.items():
            content = json.dumps(body, separators=(",", ":")).encode()
            started = time.process_time()
            answer = await world.a.post(path, content=content, headers={"content-type": "application/json"})
            seconds = time.process_time() - started
            assert seconds < 2, (name, seconds)  # of a core; usually a twentieth of that
            assert_error(answer, 400)

    in_world(tmp_path, scenario)


def test_brackets_inside_a_text_are_not_counted(tmp_path):
    async def scenario(world):
        for text in ('[{:"' * 20_000, "\\" * 40_000 + "[" * 40_000):
            answer = await world.a.post("/tokenize", json={"prompt": text})
            assert answer.status_code == 200 and answer.json()["count"] > 20_000
        answer = await world.a.post("/tokenize", json={"prompt": "a", "x": [[]] * 40_000})
        assert "32768" in assert_error(answer, 400, "invalid_json")["message"]

    in_world(tmp_path, scenario)


def test_a_bug_is_a_500_that_tells_nothing(tmp_path, caplog):
    async def scenario(world):
        async def broken(*_, **__):
            raise RuntimeError("the prompt was " + "/sec" + "ret/path 0x7f00")

        world.services.store.models.resolve = broken
        answer = await world.a.post("/v1/completions", json={**COMPLETION, "model": "other"})
        error = assert_error(answer, 500, "internal_error")
        assert error["type"] == "server_error"
        assert "secret" not in answer.text and "RuntimeError" not in answer.text
        assert "secret" not in caplog.text
        assert "RuntimeError" in caplog.text and answer.headers["x-request-id"] in caplog.text

    in_world(tmp_path, scenario)


def test_logs_hold_no_prompt_and_no_key(tmp_path, caplog):
    caplog.set_level("DEBUG")

    async def scenario(world):
        answer = await world.a.post(
            "/v1/completions?secret-query=1", json={**COMPLETION, "prompt": "secret-prompt", "n": 99}
        )
        assert answer.status_code == 400
        key = world.a.headers["authorization"].removeprefix("Bearer ")
        assert "POST /v1/completions 400" in caplog.text
        ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("coserve"))
        assert "secret" not in ours and key not in ours

    in_world(tmp_path, scenario)


@pytest.mark.parametrize("given", ["abc-123", "x" * 65, "has space", "line\u0085break"])
def test_request_ids(tmp_path, given):
    async def scenario(world):
        answer = await world.a.get("/v1/models", headers={"x-request-id": given.encode()})
        echoed = answer.headers["x-request-id"] == given
        assert echoed == (given == "abc-123")

    in_world(tmp_path, scenario)
