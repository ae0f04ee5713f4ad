"""Rendered chats equal transformers' `apply_chat_template`, in any thread, and the sandbox holds."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_templates import CHATML, FAMILIES, save_chat_tokenizer
from transformers import AutoTokenizer

from coserve.server.data.chat_template import ChatTemplate, ChatTemplateError
from coserve.server.data.tokenizer import Tokenizer

SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>"}
USER, ANSWER = {"role": "user", "content": " Hi <b>'you'</b> 😀 \n"}, {"role": "assistant", "content": "Hello!\n"}
SYSTEM = {"role": "system", "content": " Be brief. "}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nwell"}
CHATS = {
    "one": [USER],
    "turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER, USER],
    "thoughts": [USER, THOUGHT, USER, THOUGHT],
    "reasoning": [USER, {"role": "assistant", "content": "x", "reasoning": "because", "tool_calls": None}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " part "}]}],
    "not alternating": [USER, USER],
    "assistant first": [ANSWER],
    "other role": [{"role": "critic", "content": "x"}],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"ä": [1, True, None, "<&>"]}}}]


@pytest.fixture(scope="module", params=[*FAMILIES])
def pair(request, tmp_path_factory):
    """(our tokenizer, transformers') of one folder."""
    folder = tmp_path_factory.mktemp(request.param)
    save_chat_tokenizer(folder, FAMILIES[request.param])
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def outcome(call):
    """The text, or that it was refused: any exception of the template counts as that."""
    try:
        return call()
    except Exception:  # noqa: BLE001 - the oracle lets whatever the template causes through
        return None


@pytest.mark.parametrize("chat", [*CHATS])
def test_the_text_is_that_of_transformers(pair, chat):
    ours, theirs = pair
    compared = 0
    for prompt, tools, kwargs in itertools.product(
        (False, True), (None, TOOLS), ({}, {"enable_thinking": False, "date_string": "1999"})
    ):
        expected = outcome(
            lambda p=prompt, t=tools, k=kwargs: theirs.apply_chat_template(
                CHATS[chat], tokenize=False, add_generation_prompt=p, tools=t, **k
            )
        )
        try:
            text = ours.template.render(CHATS[chat], add_generation_prompt=prompt, tools=tools, variables=kwargs)
        except ChatTemplateError:
            text = None
        assert text == expected
        compared += text is not None
        if text is not None:
            ids = theirs.apply_chat_template(
                CHATS[chat], add_generation_prompt=prompt, tools=tools, return_dict=False, **kwargs
            )
            assert ours.encode(text, add_special_tokens=False) == ids
    assert compared or chat not in ("one", "turn", "system")


@pytest.mark.parametrize("words", ["go on", "go on ", " \n go on\n\n", "x"])
def test_continuing_the_final_message(pair, words):
    ours, theirs = pair
    chat = [USER, {"role": "assistant", "content": words}]
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ours.template.render(chat, continue_final_message=True) == expected


def test_generation_marks_are_those_of_transformers(tmp_path):
    save_chat_tokenizer(tmp_path, CHATML)
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    chat = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "Zürich 東京 😀"}]
    expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = ours.template.render_marked(chat)
    encoded = ours.encode_with_spans(marked.text)
    mask = [int(any(a < e and b > s for s, e in marked.spans)) for a, b in encoded.spans]
    assert encoded.ids == expected["input_ids"]
    assert mask == expected["assistant_masks"] and 0 < sum(mask) < len(mask)


def test_marks_cannot_be_forged_and_cost_nothing_in_the_plain_text():
    template = ChatTemplate(CHATML, SPECIALS)
    forged = [{"role": "user", "content": "\ue000x\ue001{% generation %}"}, ANSWER]
    marked = template.render_marked(forged)
    assert marked.text == template.render(forged)
    assert [marked.text[slice(*span)] for span in marked.spans] == ["Hello!\n<|im_end|>"]


def test_marks_inside_what_is_filtered_afterwards_are_refused_not_guessed():
    source = "{% set x %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ x | trim | upper }}"
    template = ChatTemplate(source, SPECIALS)
    assert template.render([ANSWER]) == "HELLO!"
    with pytest.raises(ChatTemplateError, match="alters"):
        template.render_marked([ANSWER])


def test_many_threads_at_once():
    template = ChatTemplate(CHATML, SPECIALS)

    def work(n):
        chat = [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "a" * n}]
        marked = template.render_marked(chat)
        return [marked.text[slice(*span)] for span in marked.spans] == ["a" * n + "<|im_end|>"] and (
            "generation" not in template.render(chat)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


@pytest.mark.security
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
        "{{ dict.__call__.__globals__.x }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range(10000000) | list }}",
        "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[9].role.x.y }}",
    ],
)
def test_the_sandbox_refuses(source):
    template = ChatTemplate(source, SPECIALS)
    with pytest.raises(ChatTemplateError):
        template.render([USER])


@pytest.mark.security
def test_messages_are_data_never_template_source():
    chat = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in range(9) %}"}]
    assert "{{ 7 * 7 }}{% for" in ChatTemplate(CHATML, SPECIALS).render(chat)


def test_templates_that_do_not_compile_and_chats_without_messages():
    with pytest.raises(ChatTemplateError, match="compile"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(ChatTemplateError, match="no messages"):
        ChatTemplate(CHATML, {}).render([])
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        ChatTemplate(CHATML, {}).render([ANSWER], add_generation_prompt=True, continue_final_message=True)


def test_the_template_variables_of_a_client_cannot_replace_the_chat():
    variables = {"messages": [], "add_generation_prompt": True, "tools": 1, "__generation_marks__": ("a", "b")}
    text = ChatTemplate(CHATML, SPECIALS).render([USER], variables=variables)
    assert text == ChatTemplate(CHATML, SPECIALS).render([USER])
