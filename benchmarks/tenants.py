"""Whether one tenant's load costs another its promises, and whether the device is divided by weight.

    python benchmarks/tenants.py --model FOLDER [--json FILE]

*Neighbour*: tenant B sends requests at random times (Poisson). Then tenant A does the same ten times as often, and then
starts five finetuning jobs as well. Shown is B's time to first token, at the client, and what each had.

*Weights*: A and B each keep more requests waiting than run, all alike, at weights 1:1 and 3:1; what A had ÷ what B had,
in output tokens, from when both had all their clients' first tokens until one of them ended.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from harness import Report, load_average, machine, parser, percentile, ratio, say, weight_shapes
from live import Job, Load, Server, random_prompts, training_rows
from peers.completions import Completions

MORE, JOBS = 10, 5
RUNNING = 8  # sequences at once where weights are compared, so that both tenants have requests waiting


@dataclass
class Traffic:
    """Requests of one tenant at random times."""

    sent: int = 0
    first_tokens: list[float] = field(default_factory=list)  # seconds from sending, of the requests that began
    tokens: int = 0


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rate", type=float, default=0.15, help="B's requests a second")
    options.add_argument("--seconds", type=float, default=60, help="of a phase")
    options.add_argument("--prompt", type=int, default=64, help="prompt tokens, on average")
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    options.add_argument("--labels", type=int, default=64)
    options.add_argument("--batch", type=int, default=4, help="sequences of an optimizer step")
    arguments = options.parse_args()
    facts, vocabulary = machine(arguments.threads), weight_shapes(arguments.model)[1][0]
    report = Report(
        f"Tenants: B alone, beside {MORE} times its requests from A, and beside A's {JOBS} jobs",
        ["phase", "B's requests", "B's first token P50 ms", "P95 ms", "P95 ÷ alone", "B tokens/s", "A tokens/s",
         "A's optimizer steps"], facts,
    )  # fmt: skip
    phases = neighbour(arguments, vocabulary)
    alone = phases["B alone"]["p95_s"]
    for name, phase in phases.items():
        report.rows.append(
            [name, phase["requests"], _ms(phase["p50_s"]), _ms(phase["p95_s"]), ratio(phase["p95_s"], alone),
             phase["b_tokens_per_second"], phase["a_tokens_per_second"], phase["steps"]]
        )  # fmt: skip
    weights = {f"{weight}:1": by_weight(arguments, vocabulary, weight) for weight in (1, 3)}
    facts["load after"] = load_average()
    report.notes = [
        f"Weights {name}, both with requests waiting: A {had['a']:.1f} and B {had['b']:.1f} tokens/s, "
        f"{had['a'] / had['b']:.2f}:1." for name, had in weights.items()
    ]  # fmt: skip
    report.figures = {"phases": phases, "weights": weights}
    report.emit(arguments.json)


# --------------------------------------------------------------------------- neighbour


def neighbour(arguments: Any, vocabulary: int) -> dict[str, dict[str, Any]]:
    rng = random.Random(0)
    prompts = random_prompts(rng, arguments.prompt, vocabulary)
    rows = training_rows(rng, 16 * arguments.batch, arguments.length, arguments.labels, vocabulary)
    phases = {}
    with Server(arguments.model, arguments.threads) as server:
        a, b = server.tenant("a"), server.tenant("b")

        def phase(name: str, rate_of_a: float, jobs: list[Job]) -> None:
            say(name)
            before = sum(len(job.events("step")) for job in jobs)
            sources = {"b": (b, arguments.rate, random.Random(1)), "a": (a, rate_of_a, random.Random(2))}
            seconds, found = traffic(sources, prompts, arguments.new_tokens, arguments.seconds)
            first = found["b"].first_tokens
            phases[name] = {
                "requests": found["b"].sent, "p50_s": percentile(first, 0.5), "p95_s": percentile(first, 0.95),
                "b_tokens_per_second": found["b"].tokens / seconds, "a_tokens_per_second": found["a"].tokens / seconds,
                "steps": sum(len(job.events("step")) for job in jobs) - before, "first_tokens_s": first,
            }  # fmt: skip

        phase("B alone", 0.0, [])
        phase(f"A {MORE} times as much", MORE * arguments.rate, [])
        jobs = [server.start_job(rows, arguments.batch, 10**6, client_of=a) for _ in range(JOBS)]
        try:
            jobs[0].wait_steps(1)
            phase(f"A's {JOBS} jobs as well", MORE * arguments.rate, jobs)
        finally:
            for job in jobs:
                job.cancel()
    return phases


def traffic(
    sources: dict[str, tuple[Completions, float, random.Random]], prompts: Iterator[list[int]], new_tokens: int,
    seconds: float,
) -> tuple[float, dict[str, Traffic]]:  # fmt: skip
    """Requests of each source (client, rate, random numbers) for so long; (seconds, traffic), of what came until then.
    What was sent before the end is awaited, so that late first tokens count."""
    found = {name: Traffic() for name in sources}

    async def request(of: Traffic, client: Completions, ends: float) -> None:
        of.sent += 1
        sent, first = time.perf_counter(), None
        async for now, count in client.stream(next(prompts), new_tokens):
            if first is None:
                first = now
                of.first_tokens.append(first - sent)
            of.tokens += count if now <= ends else 0

    async def source(of: Traffic, client: Completions, rate: float, rng: random.Random, ends: float) -> None:
        running = []
        while rate and time.perf_counter() < ends:
            await asyncio.sleep(min(rng.expovariate(rate), max(0.0, ends - time.perf_counter())))
            if time.perf_counter() < ends:
                running.append(asyncio.ensure_future(request(of, client, ends)))
        await asyncio.gather(*running)

    async def every() -> None:
        ends = time.perf_counter() + seconds
        await asyncio.gather(*(source(found[name], *how, ends) for name, how in sources.items()))

    asyncio.run(every())
    return seconds, found


# --------------------------------------------------------------------------- weights


def by_weight(arguments: Any, vocabulary: int, weight: int) -> dict[str, float]:
    """Tokens a second of A, at this weight, and of B, at 1."""
    say(f"weights {weight}:1")
    environment = {"COSERVE_TENANTS": json.dumps({"a": {"weight": weight}, "b": {"weight": 1}})}
    with Server(arguments.model, arguments.threads, environment=environment, max_running=RUNNING) as server:
        loads: dict[str, Load] = {}
        had_its_time: set[str] = set()

        def keep_waiting(name: str, seed: int) -> None:
            def enough() -> bool:
                """Both have had theirs: the one that began later, too, beside the other."""
                had_its_time.add(name)
                return len(had_its_time) == 2

            prompts = random_prompts(random.Random(seed), arguments.prompt, vocabulary)
            loads[name] = server.load(
                2 * RUNNING, arguments.seconds, prompts, arguments.new_tokens, enough, 60.0, server.tenant(name)
            )

        both = [threading.Thread(target=keep_waiting, args=(name, seed)) for name, seed in (("a", 1), ("b", 2))]
        for one in both:
            one.start()
        for one in both:
            one.join()
    began, ended = max(load.began for load in loads.values()), min(load.ended for load in loads.values())
    return {name: _tokens(load, began, ended) / (ended - began) for name, load in loads.items()}


def _tokens(load: Load, began: float, ended: float) -> int:
    return sum(count for now, count, _ in load.pieces if began <= now < ended)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


if __name__ == "__main__":
    main()
