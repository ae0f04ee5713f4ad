"""A stop string is found however the text is cut, and nothing that may belong to one is shown early."""

from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.server.gateway.stop_strings import StopScanner


def run(pieces, stops, include=False):
    scanner = StopScanner(stops, include=include)
    shown = []
    for piece in pieces:
        shown.append(scanner.feed(piece))
        if scanner.hit is not None:
            return shown, scanner.hit
    return [*shown, scanner.finish()], None


def reference(text, stops, include):
    """One character at a time: the first stop string to be complete ends the text; of two at once the longer."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


texts = st.text("ab<", max_size=12)


@settings(max_examples=500, deadline=None)
@given(st.lists(texts, max_size=6), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.booleans())
def test_the_outcome_depends_on_the_text_alone(pieces, stops, include):
    shown, hit = run(pieces, stops, include)
    assert ("".join(shown), hit) == reference("".join(pieces), stops, include)


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, max_size=6), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_a_stop_string_may_need(pieces, stops):
    scanner = StopScanner(stops)
    given_, shown = "", ""
    for piece in pieces:
        given_, shown = given_ + piece, shown + scanner.feed(piece)
        if scanner.hit is not None:
            return
        held = given_[len(shown) :]
        assert given_.startswith(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_three_pieces():
    assert run(["Hello <", "|en", "d|> more"], ["<|end|>"]) == (["Hello ", "", ""], "<|end|>")
    assert run(["Hello <", "|en", "d|> more"], ["<|end|>"], include=True) == (["Hello ", "", "<|end|>"], "<|end|>")


def test_what_only_began_like_one_is_shown_at_the_end():
    assert run(["a <|e"], ["<|end|>"]) == (["a ", "<|e"], None)


def test_text_before_the_minimum_is_not_searched():
    scanner = StopScanner(["ab"])
    assert scanner.pass_through("xaba") == "xaba"
    assert scanner.feed("b") == "b", "a stop string does not begin in text that was not searched"
    assert scanner.feed("ab") == ""
    assert scanner.hit == "ab"
