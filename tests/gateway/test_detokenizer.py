"""Text comes out of tokens one at a time and is, joined, the tokenizer's own text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import byte_fallback, byte_level, word_piece

from coserve.server.gateway.detokenizer import TextForm, make_detokenizer, text_form

TEXTS = [
    "Hello world, how are you today?",
    "naïve café in Zürich — 東京 😀🎉👩‍👩‍👧 e\u0301",
    "  two  spaces\n\nand lines\t",
    "😀",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte level": byte_level(folder / "a"),
        "byte fallback": byte_fallback(folder / "b", strip=False),
        "byte fallback, stripped": byte_fallback(folder / "c", strip=True),
        "word pieces": word_piece(folder / "d"),
    }


KINDS = ["byte level", "byte fallback", "byte fallback, stripped", "word pieces"]


def pieces_of(tokenizer, ids, *, skip_special=True, continues=()):
    detokenizer = make_detokenizer(tokenizer, text_form(tokenizer), skip_special=skip_special, continues=continues)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()]


def test_the_form_is_found_by_trial(tokenizers):
    assert [text_form(tokenizers[kind]) for kind in KINDS] == [
        TextForm.JOINED,
        TextForm.JOINED,
        TextForm.JOINED_LESS_SPACE,
        TextForm.OTHER,
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_tokenizers_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if kind != "word pieces":
        assert "".join(pieces) == text


def test_a_character_is_shown_whole_and_as_soon_as_it_is_whole(tokenizers):
    tokenizer = tokenizers["byte fallback"]
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]
    assert pieces.index("😀") == len(ids) - 2, "with its last byte, not with the token behind it"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback, stripped"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_valid_text_of_random_characters(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_ids_of_a_byte_level_vocabulary(tokenizers, data):
    """Whatever a model samples, invalid bytes included, is what the tokenizer would have made of it."""
    tokenizer = tokenizers["byte level"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip_special in (True, False):
        expected = tokenizer.decode(ids, skip_special_tokens=skip_special)
        assert "".join(pieces_of(tokenizer, ids, skip_special=skip_special)) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_ids_of_other_vocabularies_never_fail(tokenizers, data):
    kind = data.draw(st.sampled_from(KINDS))
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=20))
    "".join(pieces_of(tokenizer, ids)).encode("utf-8")


def test_an_unfinished_character_leaves_a_mark(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = tokenizer.encode("x😀", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids[:-1])) == "x\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_shown_on_request(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = [1, *tokenizer.encode("hi", add_special_tokens=False), 2]
    assert "".join(pieces_of(tokenizer, ids)) == "hi"
    assert "".join(pieces_of(tokenizer, ids, skip_special=False)) == "<bos>hi<eos>"


@pytest.mark.parametrize("kind", ["byte fallback, stripped", "word pieces"])
def test_text_that_continues_a_prompt_keeps_its_space(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt, answer = (tokenizer.encode(word, add_special_tokens=False) for word in ("Hello", "fox"))
    assert "".join(pieces_of(tokenizer, answer, continues=prompt)) == " fox"
    assert "".join(pieces_of(tokenizer, answer)) == "fox"
