"""Tokens and labels of each format, held to an independent construction with transformers' tokenizer."""

import pytest
from chat_templates import FAMILIES, save_chat_tokenizer
from transformers import AutoTokenizer

from coserve.server.api.chat import ChatMessage, render_messages
from coserve.server.data.faults import RowFault
from coserve.server.data.formats import RowEncoder
from coserve.server.data.token_row import IGNORED
from coserve.server.data.tokenizer import Tokenizer

CHAT = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three  Zürich"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five 😀"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, template in {**FAMILIES, "none": None}.items():
        made[name] = tmp_path_factory.mktemp(name)
        save_chat_tokenizer(made[name], template)
    return made


@pytest.fixture
def encoder(folders):
    def make(family="none", **options):
        tokenizer = Tokenizer.from_folder(folders[family])
        return RowEncoder(tokenizer, options.pop("vocab_size", tokenizer.vocab_size), **options)

    return make


def learned(encoder, row):
    """The text of each run of labelled tokens, and the whole text."""
    _, tokens = encoder.encode(row)
    assert len(tokens.ids) == len(tokens.labels)
    runs, current = [], []
    for id_, label in zip([*tokens.ids, 0], [*tokens.labels, IGNORED], strict=True):
        assert label in (id_, IGNORED)
        if label != IGNORED:
            current.append(id_)
        elif current:
            runs.append(encoder.tokenizer.decode(current, skip_special_tokens=False))
            current = []
    return runs, encoder.tokenizer.decode(tokens.ids, skip_special_tokens=False)


def fault(encoder, row):
    with pytest.raises(RowFault) as caught:
        encoder.encode(row)
    return caught.value


# ---------------------------------------------------------------------- chat

TURNS = {  # what each family's model says, from where it begins to where it stops
    "none": [" three  Zürich<eos>", " five 😀<eos>"],
    "chatml": ["three  Zürich<|im_end|>", "five 😀<|im_end|>"],
    "chatml_unmarked": ["three  Zürich<|im_end|>", "five 😀<|im_end|>"],
    "headers": ["three  Zürich<|im_end|>", "five 😀<|im_end|>"],
    "alternating": ["three  Zürich<|im_end|>", "five 😀<|im_end|>"],
    "instruct": [" three  Zürich<eos>", " five 😀<eos>"],
}


@pytest.mark.parametrize("family", [*TURNS])
def test_assistant_turns_bear_loss_with_their_end_and_nothing_else(encoder, family):
    runs, text = learned(encoder(family), {"messages": CHAT})
    assert runs == TURNS[family]
    assert text == encoder(family).tokenizer.template.render(CHAT)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_training_sees_the_prompt_that_serving_makes(encoder, role):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = [{"role": role, "content": parts}, {"role": "user", "content": parts}]
    wanted = encoder("chatml")
    chat = render_messages([ChatMessage.model_validate(message) for message in asked])
    prompt = wanted.tokenizer.template.render(chat, add_generation_prompt=True)
    ids = list(wanted.tokenizer.encode(prompt, add_special_tokens=False))
    _, row = wanted.encode({"messages": [*asked, {"role": "assistant", "content": "three"}]})
    assert list(row.ids[: len(ids)]) == ids and "one\ntwo" in prompt and "developer" not in prompt
    assert set(row.labels[: len(ids)]) == {IGNORED} and row.labels[len(ids)] == row.ids[len(ids)]


@pytest.mark.parametrize("family", [*TURNS])
def test_weights_and_the_last_answer_only(encoder, family):
    weighted = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]
    assert learned(encoder(family), {"messages": weighted})[0] == TURNS[family][1:]
    weighted = [CHAT[0], {**CHAT[1], "weight": 1}, CHAT[2], {**CHAT[3], "weight": 0}]
    assert learned(encoder(family), {"messages": weighted})[0] == TURNS[family][:1]
    assert learned(encoder(family, loss_on="completion"), {"messages": CHAT})[0] == TURNS[family][1:]
    runs, text = learned(encoder(family, loss_on="all"), {"messages": CHAT})
    assert runs == [text]


@pytest.mark.parametrize("family", ["none", "chatml", "chatml_unmarked", "headers", "alternating", "instruct"])
def test_the_mask_is_the_prefix_difference_in_tokens(folders, encoder, family):
    """Built from two tokenizations, as a request and its answer would meet."""
    oracle = AutoTokenizer.from_pretrained(folders[family])
    render = encoder(family).tokenizer.template.render
    _, tokens = encoder(family).encode({"messages": CHAT[:2]})
    prompt = oracle(render(CHAT[:1], add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    assert tokens.ids[: len(prompt)] == prompt
    assert tokens.labels[: len(prompt)] == [IGNORED] * len(prompt)
    answer = tokens.labels[len(prompt) :]
    assert (
        answer[0] != IGNORED
        and [label for label in answer if label != IGNORED][-1] in encoder(family).tokenizer.stop_ids
    )


def test_a_template_that_rewrites_earlier_turns(encoder):
    thinking = encoder("thinking")
    refused = fault(thinking, {"messages": CHAT})
    assert refused.field == "messages[1]" and "completion" in refused.remedy
    runs, _ = learned(encoder("thinking", loss_on="completion"), {"messages": CHAT})
    assert runs == ["<think>\n\n</think>\n\nfive 😀<|im_end|>"]
    assert learned(thinking, {"messages": CHAT[:2]})[0] == ["<think>\n\n</think>\n\nthree  Zürich<|im_end|>"]


def test_a_chat_of_thousands_of_turns_is_split_or_marked_not_rendered_for_minutes(encoder):
    turns = [{"role": role, "content": "a"} for _ in range(501) for role in ("user", "assistant")]
    assert fault(encoder("chatml_unmarked"), {"messages": turns}).field == "messages"
    assert encoder("chatml_unmarked").encode({"messages": turns[:100]})
    assert encoder("chatml").encode({"messages": turns})
    assert encoder("chatml_unmarked", loss_on="all").encode({"messages": turns})


def test_content_in_parts_is_their_text(encoder):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    whole = {"messages": [{"role": "user", "content": "one\ntwo"}, CHAT[1]]}
    chat = [{"role": "user", "content": parts}, CHAT[1]]
    assert encoder("chatml").encode({"messages": chat}) == encoder("chatml").encode(whole)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"), ("hi", "messages"), (None, "messages"), ([{"role": "user", "content": "x"}], "messages"),
        (["x"], "messages[0]"), ([{"content": "x"}], "messages[0].role"),
        ([{"role": [], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"), ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "a\0"}], "messages[0].content"),
        ([{"role": "user", "content": "\udc00"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([CHAT[0], {**CHAT[1], "weight": 0.5}], "messages[1].weight"),
        ([CHAT[0], {**CHAT[1], "weight": True}], "messages[1].weight"),
        ([CHAT[0], {**CHAT[1], "weight": "1"}], "messages[1].weight"),
        ([CHAT[0], {**CHAT[1], "weight": [1]}], "messages[1].weight"),
        ([{**CHAT[0], "weight": 1}, CHAT[1]], "messages[0].weight"),
        ([CHAT[0], {**CHAT[1], "weight": 0}], "messages"),
        ([CHAT[0], {**CHAT[1], "tool_calls": [{}]}], "messages[1].tool_calls"),
        ([CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]], "messages[1].role"),
    ],
)  # fmt: skip
def test_bad_chats_name_the_field(encoder, messages, field):
    assert fault(encoder(), {"messages": messages}).field == field


def test_empty_tools_are_none(encoder):
    """As exporters write them, and as the chat route takes them."""
    chat = [CHAT[0], {**CHAT[1], "tool_calls": [], "function_call": None}]
    row = {"messages": chat, "tools": [], "functions": None}
    assert encoder("chatml").encode(row) == encoder("chatml").encode({"messages": CHAT[:2]})
    assert fault(encoder("chatml"), {**row, "tools": [{"type": "function"}]}).field == "tools"


def test_what_the_template_refuses_is_a_fault_of_the_row(encoder):
    refused = fault(encoder("alternating"), {"messages": [CHAT[0], CHAT[0], CHAT[1]]})
    assert "alternate" in refused.reason and refused.field == "messages"
    assert fault(encoder("chatml_unmarked"), {"messages": [CHAT[1]]}).field == "messages[0]"
    named = [{**CHAT[0], "name": "\ud800"}, CHAT[1]]
    assert learned(encoder("chatml"), {"messages": named})[0]


# ---------------------------------------------------------------------- text, completion


def test_text_has_the_start_tokens_and_the_end_of_sequence(folders, encoder):
    oracle = AutoTokenizer.from_pretrained(folders["none"])
    _, tokens = encoder().encode({"text": "Hello world"})
    assert tokens.ids == [*oracle("Hello world")["input_ids"], oracle.eos_token_id]
    assert tokens.labels == [IGNORED, *tokens.ids[1:]]
    assert encoder().encode({"text": "Hello world<eos>"})[1] == tokens


def test_completion_learns_the_answer_and_its_end(folders, encoder):
    oracle = AutoTokenizer.from_pretrained(folders["none"])
    row = {"prompt": "Hello", "completion": " world"}
    _, tokens = encoder().encode(row)
    prompt, answer = oracle("Hello")["input_ids"], oracle(" world", add_special_tokens=False)["input_ids"]
    assert tokens.ids == [*prompt, *answer, oracle.eos_token_id]
    assert tokens.labels == [IGNORED] * len(prompt) + [*answer, oracle.eos_token_id]
    _, everything = encoder(loss_on="all").encode(row)
    assert everything.ids == tokens.ids and everything.labels == [IGNORED, *tokens.ids[1:]]


def test_an_answer_starts_at_a_token_border_of_its_own(folders, encoder):
    """ "Hello " + "world" is one token less than its parts, but a request sends the prompt alone."""
    oracle = AutoTokenizer.from_pretrained(folders["none"])
    _, tokens = encoder().encode({"prompt": "Hello ", "completion": "world"})
    prompt = oracle("Hello ")["input_ids"]
    assert oracle("Hello world")["input_ids"][: len(prompt)] != prompt, "else this tests nothing"
    assert tokens.ids[: len(prompt)] == prompt
    assert learned(encoder(), {"prompt": "Hello ", "completion": "world"})[0] == ["world<eos>"]


# ---------------------------------------------------------------------- pre-tokenized


def test_tokens_are_taken_as_they_are(encoder):
    _, tokens = encoder().encode({"input_ids": [5, 6, 7], "labels": [5, -100, 9], "attention_mask": [1, 1, 1]})
    assert (tokens.ids, tokens.labels, tokens.loss_tokens) == ([5, 6, 7], [5, -100, 9], 1)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"input_ids": []}, "input_ids"), ({"input_ids": 5}, "input_ids"), ({"input_ids": [1]}, "labels"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels"), ({"input_ids": [1], "labels": None}, "labels"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "input_ids[1]"),
        ({"input_ids": [1.0], "labels": [1]}, "input_ids[0]"),
        ({"input_ids": [-1], "labels": [1]}, "input_ids[0]"), ({"input_ids": [99], "labels": [1]}, "input_ids[0]"),
        ({"input_ids": [-100], "labels": [1]}, "input_ids[0]"),
        ({"input_ids": [10**30], "labels": [1]}, "input_ids[0]"),
        ({"input_ids": [1], "labels": [-1]}, "labels[0]"), ({"input_ids": [1], "labels": [-101]}, "labels[0]"),
        ({"input_ids": [1], "labels": [99]}, "labels[0]"), ({"input_ids": ["1"], "labels": [1]}, "input_ids[0]"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "attention_mask"),
    ],
)  # fmt: skip
def test_bad_tokens_name_the_field(encoder, row, field):
    assert fault(encoder(vocab_size=99), row).field == field


# ---------------------------------------------------------------------- which format


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({}, None), ({"x": 1}, None), ({"text": "a", "messages": []}, None), ({"text": "a", "input_ids": [1]}, None),
        ({"text": ""}, "text"), ({"text": None}, "text"), ({"text": ["a"]}, "text"), ({"text": "a\0b"}, "text"),
        ({"text": "\ud83d"}, "text"), ({"prompt": "a"}, "completion"), ({"completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": ""}, "completion"), ({"prompt": [{}], "completion": [{}]}, "prompt"),
        ({"messages": CHAT, "tools": [{}]}, "tools"),
    ],
)  # fmt: skip
def test_rows_of_no_format_or_of_two(encoder, row, field):
    refused = fault(encoder(), row)
    assert refused.field == field and refused.reason and refused.remedy


def test_tokens_that_the_model_does_not_have(encoder):
    assert "embedding" in fault(encoder(vocab_size=100), {"text": "Hello <|im_end|>"}).reason
