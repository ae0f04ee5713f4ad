"""The data set is what it says: rows of its own, forms that follow from the messages, nothing held out in training."""

import json
import re
import statistics
from collections import Counter

import pytest

from coserve.server.demo.orders import HELD_OUT_FILE, TRAINING_FILE, Order, is_exact, parse_answer, read_orders

DAYS = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "today", "tomorrow"}
SHORT = {"mon", "tue", "tues", "wed", "thurs", "fri", "sat", "sun", "tmrw", "tonight", "tonight's", "afternoon"}


@pytest.fixture(scope="module", params=[TRAINING_FILE, HELD_OUT_FILE], ids=["train", "held-out"])
def path(request):
    return request.param


def test_sizes():
    assert 200 <= len(read_orders(TRAINING_FILE)) <= 400
    assert len(read_orders(HELD_OUT_FILE)) == 40


def test_every_form_follows_from_its_message(path):
    for order in read_orders(path):
        form, message = order.form, order.message
        assert list(form) == ["item", "count", "day"], message
        assert isinstance(form["item"], str) and form["item"] in message.lower(), message
        assert type(form["count"]) is int and form["count"] >= 1, message
        words = set(re.findall(r"[a-z']+", message.lower()))
        if form["day"] is None:
            assert not words & (DAYS | SHORT), message
        else:
            assert form["day"] in DAYS
            assert any(form["day"] in word for word in words) or words & SHORT, message


def test_digits_in_a_message_that_has_one_number_are_the_count(path):
    """Numbers written as digits are copied unless they are something else (an address, a time, a correction)."""
    wrong = []
    for order in read_orders(path):
        numbers = [int(number) for number in re.findall(r"(?<![\w-])\d+(?!\w)", order.message)]
        if len(numbers) == 1 and numbers[0] != order.form["count"]:
            wrong.append(order.message)
    assert len(wrong) <= 12, wrong


def test_rows_are_short_one_line_completions(path):
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert statistics.median(len((row["prompt"] + row["completion"]).split()) for row in rows) < 30
    for row in rows:
        assert row["prompt"].endswith("\nOrder:") and row["completion"].startswith(" {")
        assert "\n" not in row["completion"]
        assert parse_answer(row["completion"]) is not None


def test_no_templates_and_nothing_held_out_is_trained_on():
    train, held_out = read_orders(TRAINING_FILE), read_orders(HELD_OUT_FILE)
    messages = [order.message for order in train + held_out]
    assert len(set(messages)) == len(messages)

    def skeleton(order: Order) -> str:
        text = order.message.lower().replace(str(order.form["item"]), "ITEM")
        return re.sub(r"\d+", "N", re.sub("|".join(DAYS), "DAY", text))

    assert max(Counter(map(skeleton, train + held_out)).values()) == 1
    starts = Counter(" ".join(message.lower().split()[:3]) for message in messages)
    assert max(starts.values()) <= 3, starts.most_common(3)
    seen = {order.form["item"] for order in train}
    assert sum(order.form["item"] in seen for order in held_out) <= 6


def test_an_answer_is_exact_only_with_the_same_keys_values_and_types():
    order = Order("two pies\nOrder:", {"item": "pies", "count": 2, "day": None})
    assert is_exact(order, ' {"day": null, "item": "pies", "count": 2}')
    for answer in (
        '{"item": "pies", "count": "2", "day": null}',
        '{"item": "pies", "count": 2.0, "day": null}',
        '{"item": "pies", "count": 2}',
        '{"item": "pies", "count": 2, "day": null, "more": 1}',
        '{"item": "Pies", "count": 2, "day": null}',
        '[{"item": "pies", "count": 2, "day": null}]',
        '{"item": "pies", "count": 2, "day": null} and',
        "",
    ):
        assert not is_exact(order, answer), answer
