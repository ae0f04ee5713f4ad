"""What the show prints when it is over: answers before and after, speeds, the claims, and what to type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from coserve.server.demo.evaluation import Result
from coserve.server.demo.orders import HELD_OUT_FILE, is_exact, read_orders
from coserve.server.demo.proof import Shared
from coserve.server.demo.verdict import Claim

EXAMPLES = 5
_WIDTH = 76


def print_answers(console: Console, before: Result, after: Result) -> None:
    """A few of the held-out orders, spread over the file, as both models answered them."""
    console.print("\nHeld-out orders, before and after:")
    step = max(1, len(after.orders) // EXAMPLES)
    for order, base, adapter in list(zip(after.orders, before.answers, after.answers, strict=True))[::step][:EXAMPLES]:
        mark = "✓" if is_exact(order, adapter) else f"✗ (wanted {json.dumps(order.form, ensure_ascii=False)})"
        lines = (f"  “{order.message}”", f"      before  {_short(base)}", f"      after   {_short(adapter)}  {mark}")
        console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)


def print_speed(
    console: Console,
    phases: Sequence[tuple[str, Mapping[str, float], float | None, float | None]],
    shared: Shared,
) -> None:
    """Tokens a second and inter-token latency of each phase: (name, rates by kind, P50, P99 in seconds)."""
    table = Table(title="\nSpeed, as the server counted and the readers saw it", title_justify="left")
    table.add_column("")
    for column in ("decode tokens/s", "trained tokens/s", "P50", "P99"):
        table.add_column(column, justify="right")
    for name, rates, p50, p99 in phases:
        table.add_row(
            name, f"{rates['decode']:.1f}", f"{rates['train_backward']:.1f}", _milliseconds(p50), _milliseconds(p99)
        )
    console.print(table)
    if shared.with_streams:
        share = 100 * shared.in_promise / shared.with_streams
        console.print(f"Iterations with a stream inside the inter-token promise while training: {share:.1f} %")


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    console.print("\nWhat this showed:")
    for claim in claims:
        console.print(f"  {'✓' if claim.held else '✗'} {claim.text}", markup=False, highlight=False, soft_wrap=True)


def next_steps(console: Console, serve: str, adapter: str, key: str) -> None:
    """Commands that work as they stand, with the key of the tenant that the adapter belongs to."""
    prompt = read_orders(HELD_OUT_FILE)[-1].prompt
    body = json.dumps({"model": adapter, "prompt": prompt, "max_tokens": 32, "temperature": 0})
    text = f"""
Next, start the server again and keep it:

  {serve}

In another terminal, as the tenant that trained (its adapter does not exist for anybody else):

  export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY={key}
  curl $OPENAI_BASE_URL/completions -H "Authorization: Bearer $OPENAI_API_KEY" \\
    -H "Content-Type: application/json" -d {shlex.quote(body)}

or with the openai client (pip install openai):

  from openai import OpenAI
  client = OpenAI()
  print([model.id for model in client.models.list()])
  print(client.completions.create(model={adapter!r},
      prompt={prompt!r}, max_tokens=32, temperature=0).choices[0].text)
"""
    console.print(text, markup=False, highlight=False, soft_wrap=True, end="")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"
