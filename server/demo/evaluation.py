"""Asks a model about held-out orders, greedily, a few at a time, and counts the exact answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coserve.server.demo.client import Client
from coserve.server.demo.orders import ANSWER_TOKENS, STOP, Order, is_exact

AT_ONCE = 16

# what the base must still answer, word for word, after another tenant's adapter was trained beside it
BASE_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils when",
)
BASE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Result:
    """The answers in the order of the questions."""

    orders: tuple[Order, ...]
    answers: tuple[str, ...]

    @property
    def exact(self) -> int:
        return sum(is_exact(order, answer) for order, answer in zip(self.orders, self.answers, strict=True))


async def ask(
    client: Client, model: str, orders: Sequence[Order], on_answer: Callable[[int], None] = lambda done: None
) -> Result:
    """Greedy answers of `model`; `on_answer` hears how many are there. Raises CallFailed."""
    gate = asyncio.Semaphore(AT_ONCE)
    done = 0

    async def one(order: Order) -> str:
        nonlocal done
        async with gate:
            text = await client.complete(
                model=model, prompt=order.prompt, max_tokens=ANSWER_TOKENS, temperature=0, stop=[STOP]
            )
        done += 1
        on_answer(done)
        return text

    answers = await asyncio.gather(*(one(order) for order in orders))
    return Result(tuple(orders), tuple(answers))


async def base_answers(client: Client, model: str) -> tuple[str, ...]:
    """The base model's own greedy words, one prompt after the other."""
    return tuple(
        [
            await client.complete(model=model, prompt=prompt, max_tokens=BASE_TOKENS, temperature=0)
            for prompt in BASE_PROMPTS
        ]
    )
