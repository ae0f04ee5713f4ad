"""The data set: informal messages to a shop, and the order that each of them makes as a small JSON form.

Written by hand for this demo, every message on its own; the held-out ones were never trained on. `item` stands in
the message word for word, `count` is a number, `day` a weekday, "today", "tomorrow" or null where none is named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRAINING_FILE = DATA / "orders-train.jsonl"
HELD_OUT_FILE = DATA / "orders-held-out.jsonl"
ANSWER_TOKENS = 32  # the longest form has 25
STOP = "\n"  # a form is one line


@dataclass(frozen=True, slots=True)
class Order:
    """One row: the prompt as the model gets it, and the form that it should answer."""

    prompt: str
    form: dict[str, object]

    @property
    def message(self) -> str:
        return self.prompt.rsplit("\n", 1)[0]


def read_orders(path: Path) -> list[Order]:
    """The rows of one of the two files."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [Order(row["prompt"], json.loads(row["completion"])) for row in rows]


def parse_answer(text: str) -> dict[str, object] | None:
    """The form in a model's answer; None if the answer is not one JSON object."""
    try:
        form = json.loads(text)
    except ValueError:
        return None
    return form if isinstance(form, dict) else None


def is_exact(order: Order, answer: str) -> bool:
    """Whether the answer is the order's form: the same keys and the same values of the same types."""
    form = parse_answer(answer)
    return form is not None and json.dumps(form, sort_keys=True) == json.dumps(order.form, sort_keys=True)
