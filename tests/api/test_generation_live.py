"""The official client against a real engine, with transformers as the oracle of what it must say."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

PROMPTS = ["Hello world", "The quick brown fox", "one two three", "Zürich 東京 😀", "a"]


@pytest.fixture(scope="module")
def client(server):
    with server.openai(max_retries=0, timeout=150) as client:
        yield client


def streamed(chunks):
    """Texts, finish reasons and the usage of a completions stream, by choice."""
    texts, reasons, usage = {}, {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_greedy_completions_are_transformers_own(client, oracle):
    for prompt in PROMPTS:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=24, temperature=0, extra_body={"return_token_ids": True}
        )
        ids = oracle.tokenizer(prompt)["input_ids"]
        expected = oracle.greedy(ids, 24)
        choice = answer.choices[0]
        assert choice.prompt_token_ids == ids
        assert choice.token_ids == expected
        assert choice.text == oracle.text(expected)
        assert choice.finish_reason == ("stop" if expected[-1] == 2 else "length")
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == len(expected)


def test_all_forms_of_a_prompt(client, oracle):
    ids = [oracle.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    expected = [oracle.text(oracle.greedy(one, 8)) for one in ids]
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    assert [c.text for c in client.completions.create(prompt=PROMPTS[:3], **options).choices] == expected
    assert [c.text for c in client.completions.create(prompt=ids, **options).choices] == expected
    assert client.completions.create(prompt=ids[1], **options).choices[0].text == expected[1]
    two = client.completions.create(prompt=PROMPTS[:3], n=2, **options)
    assert [choice.text for choice in two.choices] == [text for text in expected for _ in range(2)]
    assert [choice.index for choice in two.choices] == list(range(6))
    assert two.usage.prompt_tokens == sum(map(len, ids))


def test_chat_is_the_templates_text_continued(client, oracle, server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀"}]
    with server.http() as http:
        ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("Assistant:")
    expected = oracle.greedy(ids, 12)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == oracle.text(expected)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    parts = [messages[0], {"role": "user", "content": [{"type": "text", "text": "Hi 😀"}]}]
    assert client.chat.completions.create(
        model="tiny", messages=parts, max_completion_tokens=12, temperature=0
    ).choices[0].message.content == oracle.text(expected)  # fmt: skip


def test_chat_without_a_bound_goes_to_the_end_of_the_context(client, server):
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, extra_body={"ignore_eos": True, "truncate_prompt_tokens": 6}
    )
    context = client.models.retrieve("tiny").max_model_len
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.total_tokens == context
    assert answer.choices[0].finish_reason == "length"
    assert client.completions.create(
        model="tiny", prompt="Hi", temperature=0, extra_body={"ignore_eos": True}
    ).usage.completion_tokens == 16  # fmt: skip


def test_continuing_the_final_message(client, oracle, server):
    messages = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "Well, I"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0,
        extra_body={"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True},
    )  # fmt: skip
    assert oracle.tokenizer.decode(answer.prompt_token_ids).endswith("Assistant: Well, I")
    assert answer.choices[0].token_ids == oracle.greedy(answer.prompt_token_ids, 8)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_streamed_deltas_are_the_plain_text(client, temperature):
    for seed, prompt in enumerate(PROMPTS):
        options = {
            "model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": temperature, "seed": seed, "n": 2
        }  # fmt: skip
        plain = client.completions.create(**options)
        texts, reasons, usage = streamed(
            client.completions.create(**options, stream=True, stream_options={"include_usage": True})
        )
        assert texts == {choice.index: choice.text for choice in plain.choices}
        assert reasons == {choice.index: choice.finish_reason for choice in plain.choices}
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            plain.usage.prompt_tokens,
            plain.usage.completion_tokens,
        )


def test_the_chat_streams_shape(server):
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "stream": True, "n": 2,
        "stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    assert "\nid:" not in text and not text.startswith("id:")
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    *rest, last = chunks
    assert all(chunk["usage"] is None for chunk in rest)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    for index in range(2):
        own = [choice for chunk in rest for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
    body["stream_options"] = None
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert '"usage"' not in "".join(answer.iter_text())


def test_stop_strings_cut_plain_and_streamed_text_alike(client, oracle):
    ids = oracle.tokenizer("Hello world")["input_ids"]
    whole = oracle.text(oracle.greedy(ids, 40, eos=False))
    stop = whole[9:13]
    cut = whole[: whole.index(stop)]
    options = {
        "model": "tiny", "prompt": "Hello world", "max_tokens": 40, "temperature": 0, "stop": ["no such text", stop]
    }  # fmt: skip
    extra = {"ignore_eos": True}
    plain = client.completions.create(**options, extra_body=extra)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == (cut, "stop")
    assert plain.choices[0].stop_reason == stop
    assert plain.usage.completion_tokens < 40
    texts, reasons, _ = streamed(client.completions.create(**options, stream=True, extra_body=extra))
    assert (texts[0], reasons[0]) == (cut, "stop")
    shown = client.completions.create(**options, extra_body={**extra, "include_stop_str_in_output": True})
    assert shown.choices[0].text == cut + stop
    late = client.completions.create(**options, extra_body={**extra, "min_tokens": 40})
    assert late.choices[0].text == whole


def test_stop_tokens(client, oracle):
    ids = oracle.tokenizer("one two three")["input_ids"]
    expected = oracle.greedy(ids, 20, eos=False)
    stop = expected[7]
    first = expected.index(stop)
    options = {"model": "tiny", "prompt": "one two three", "max_tokens": 20, "temperature": 0}
    extra = {"stop_token_ids": [stop], "return_token_ids": True, "ignore_eos": True}
    choice = client.completions.create(**options, extra_body=extra).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == expected[: first + 1]
    assert choice.text == oracle.text(expected[:first]), "the stop token is not visible"
    shown = client.completions.create(**options, extra_body={**extra, "include_stop_str_in_output": True}).choices[0]
    assert shown.text == oracle.text(expected[: first + 1])


def test_logprobs_of_completions_and_of_their_prompt(client, oracle):
    prompt = "The quick brown fox"
    ids = oracle.tokenizer(prompt)["input_ids"]
    new = oracle.greedy(ids, 6, eos=False)
    reference = oracle.logprobs([*ids, *new])
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=6, temperature=0, logprobs=3, echo=True, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    assert choice.text == prompt + oracle.text(new)
    assert len(choice.logprobs.tokens) == len(ids) + len(new) == len(choice.logprobs.text_offset)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    for position, token_id in enumerate([*ids, *new][1:]):
        assert choice.logprobs.token_logprobs[position + 1] == pytest.approx(
            float(reference[position, token_id]), abs=1e-4
        )
        best = sorted(reference[position].tolist(), reverse=True)[:3]
        given = sorted(choice.logprobs.top_logprobs[position + 1].values(), reverse=True)[:3]
        assert given == pytest.approx(best, abs=1e-4)
    for token, offset in zip(choice.logprobs.tokens[1:], choice.logprobs.text_offset[1:], strict=True):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice.text[offset:].startswith(token)
    only = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert only.text == prompt
    assert only.logprobs.token_logprobs == pytest.approx(choice.logprobs.token_logprobs[: len(ids)], abs=1e-4)


def test_logprobs_of_a_chat_streamed_and_plain(client, oracle):
    options = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    plain = client.chat.completions.create(**options, extra_body={"return_token_ids": True, "ignore_eos": True})
    content = plain.choices[0].logprobs.content
    assert len(content) == 12
    reference = oracle.logprobs([*plain.prompt_token_ids, *plain.choices[0].token_ids])
    start = len(plain.prompt_token_ids) - 1
    for position, (entry, token_id) in enumerate(zip(content, plain.choices[0].token_ids, strict=True)):
        assert entry.logprob == pytest.approx(float(reference[start + position, token_id]), abs=1e-4)
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs), abs=1e-4)
        assert len(entry.top_logprobs) == 2
    text = bytes(byte for entry in content for byte in entry.bytes).decode("utf-8", "replace")
    assert text == plain.choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    entries = [
        entry for chunk in chunks for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in entries] == [entry.token for entry in content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_a_seed_repeats_alone_and_in_company(client):
    options = {"model": "tiny", "prompt": "Hello", "max_tokens": 16, "temperature": 1.2, "seed": 7, "n": 3}
    alone = [choice.text for choice in client.completions.create(**options).choices]
    assert len(set(alone)) == 3, "choices differ"
    with ThreadPoolExecutor(12) as pool:
        others = [
            pool.submit(client.completions.create, model="tiny", prompt=f"other {i}", max_tokens=30, seed=i)
            for i in range(9)
        ]
        again = [pool.submit(client.completions.create, **options) for _ in range(3)]
        for answer in again:
            assert [choice.text for choice in answer.result().choices] == alone
        for answer in others:
            answer.result()
    unseeded = {client.completions.create(**{**options, "seed": None, "n": 1}).choices[0].text for _ in range(3)}
    assert len(unseeded) > 1


def test_logit_bias_and_penalties_reach_the_sampler(client, oracle):
    forced = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=5, temperature=0, logit_bias={"77": 100},
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert forced.choices[0].token_ids == [77] * 5
    varied = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=5, temperature=0, logit_bias={"77": 100}, frequency_penalty=2,
        extra_body={"return_token_ids": True, "repetition_penalty": 10.0},
    )  # fmt: skip
    assert varied.choices[0].token_ids[0] == 77
    assert varied.choices[0].token_ids != [77] * 5


def test_cached_tokens_belong_to_a_salt(client):
    prompt = "The quick brown fox jumps over the lazy dog. " * 4
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}

    def cached(**extra):
        return client.completions.create(**options, extra_body=extra).usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") > 0
    assert cached(cache_salt="two") == 0


def test_models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert listed[0].root == "tiny" and listed[0].parent is None and listed[0].max_model_len == 512
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("ft:tiny:x::y")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.models.delete("tiny")


def test_the_clients_own_errors(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert caught.value.request_id
    with pytest.raises(openai.AuthenticationError):
        server.openai(key="sk-cs-wrong", max_retries=0).models.list()
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt="x", max_tokens=1, extra_body={"colour": "red", "user": "me"}
    )
    assert raw.headers["x-coserve-warning"] == "ignored unknown fields: colour"


EXTREMES = [
    {"temperature": 2}, {"temperature": 1e-30}, {"temperature": 5e-324}, {"top_p": 0}, {"top_p": 1e-300},
    {"top_k": 1}, {"top_k": 2**31 - 1}, {"min_p": 1}, {"min_p": 5e-324}, {"presence_penalty": -2},
    {"frequency_penalty": 2}, {"repetition_penalty": 0.01}, {"repetition_penalty": 10},
    {"logit_bias": {str(i): -100 for i in range(512)}}, {"logit_bias": {str(i): 100 for i in range(512)}},
    {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"n": 64, "max_tokens": 2}, {"logprobs": 20}, {"min_tokens": 8},
    {"stop": ["x" * 256] * 16}, {"stop_token_ids": list(range(256))}, {"ignore_eos": True, "min_tokens": 8},
    {"temperature": 2, "top_p": 1e-9, "top_k": 1, "min_p": 1, "presence_penalty": 2, "frequency_penalty": -2},
    {"cache_salt": "😀" * 256}, {"logit_bias": {"2": 100}, "min_tokens": 8},
]  # fmt: skip


def test_no_extreme_ends_the_engine_and_a_neighbour_never_notices(server, client):
    pid = server.pid("engine")
    options = {"model": "tiny", "prompt": "one two", "max_tokens": 300, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    undisturbed = client.completions.create(**options).choices[0].text
    with ThreadPoolExecutor(1) as pool, server.http() as http:
        neighbour = pool.submit(lambda: streamed(client.completions.create(**options, stream=True))[0][0])
        for extreme in EXTREMES:
            body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, **extreme}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, (extreme, answer.text)
            assert all(choice["finish_reason"] in ("stop", "length") for choice in answer.json()["choices"])
        assert neighbour.result() == undisturbed
    assert server.pid("engine") == pid


def test_a_request_is_ended_at_its_deadline_and_its_neighbour_is_not(server, client):
    options = {"model": "tiny", "prompt": "Hello", "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(lambda: client.completions.create(**options, max_tokens=64))
        hurried = {"ignore_eos": True, "request_timeout_seconds": 0.02}
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**options | {"extra_body": hurried}, max_tokens=200)
        assert (caught.value.status_code, caught.value.code) == (408, "deadline_exceeded")
        assert neighbour.result().usage.completion_tokens == 64
    with server.http() as http:
        assert http.get("/v1/coserve/queue").json()["data"] == []


def test_metrics_after_all_this(server):
    with server.http() as http:
        time.sleep(1.1)
        text = http.get("/metrics").text
    for name in (
        'coserve_step_tokens_total{kind="decode"}', 'coserve_step_tokens_total{kind="prefill"}',
        'coserve_itl_seconds_count{slo_class="interactive"}', 'coserve_ttft_seconds_count{slo_class="interactive"}',
        'coserve_generation_requests_total{result="completed"}', "coserve_slo_attainment",
        "coserve_iteration_slo_share", 'coserve_generation_tokens_total{kind="completion"}',
    ):  # fmt: skip
        value = next((line for line in text.splitlines() if line.startswith(name)), None)
        assert value is not None, name
        assert float(value.rsplit(" ", 1)[1]) >= 0
    with httpx.Client(trust_env=False) as nobody:
        assert nobody.get(f"{server.url}/metrics").status_code == 401
