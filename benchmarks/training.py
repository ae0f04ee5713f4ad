"""Training alone: tokens a second of coserve's two activation policies against a PEFT loop, the FLOP ratio beside it.

    python benchmarks/training.py --model FOLDER [--json FILE]

LoRA of rank 16 on all linear layers, batches of 8 sequences of 256 tokens whose last 64 bear a loss, AdamW, float32.
coserve trains over its API in whole servers without streams; its rate is that of completed optimizer steps from the
job's start to its last step. Systems take turns, round by round; figures are medians of the rounds.

FLOP a token count products with frozen weights: 2 a parameter forward, 2 for the gradient of the input, and 2 again
where the forward is repeated; the head's on every row (PEFT) or on rows that bear a loss (coserve). The floor is
the measured time of just these products in their quickest form, windows of 256 rows and heads of 64.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import Any

from harness import Report, Worker, WorkerFailed, load_average, machine, median, parser, ratio, say, weight_shapes
from live import Server, step_rate, training_rows

WINDOW, HEAD_ROWS = 256, 64  # coserve's own sizes on a CPU


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    options.add_argument("--labels", type=int, default=64, help="of them that bear a loss")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--steps", type=int, default=2, help="optimizer steps a round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--slo-itl-ms", type=float, help="the servers' promise between tokens [theirs]")
    arguments = options.parse_args()
    facts = machine(arguments.threads)
    rng = random.Random(0)
    layers, head = weight_shapes(arguments.model)
    size = {"layers": sum(a * b for a, b in layers), "head": head[0] * head[1]}
    share = arguments.labels / arguments.length
    # Products with frozen weights a token: (forwards of the layers, backwards, forwards of the head, backwards).
    work = {
        "coserve, save": (1, 1, share, share),
        "coserve, recompute": (2, 1, share, share),
        "PEFT": (1, 1, 1, 1),
        "PEFT, gradient checkpointing": (2, 1, 1, 1),
    }
    absent: dict[str, str] = {}

    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        workers: dict[str, Worker] = {}
        for policy in ("save", "recompute"):
            say(f"starting coserve, {policy}")
            limits: dict[str, Any] = {"activations": policy, "kv_memory": "128MiB", "adapter_memory": "128MiB"}
            if arguments.slo_itl_ms:
                limits["slo_itl_ms"] = arguments.slo_itl_ms
            server = Server(arguments.model, arguments.threads, **limits)
            servers[f"coserve, {policy}"] = stack.enter_context(server)
        for name, flags in (("PEFT", []), ("PEFT, gradient checkpointing", ["--checkpointing"])):
            say(f"starting {name}")
            try:
                worker = Worker(
                    "peft_training.py", f"--model={arguments.model}", f"--length={arguments.length}",
                    f"--labels={arguments.labels}", f"--batch={arguments.batch}", f"--rank={arguments.rank}", *flags,
                    threads=arguments.threads,
                )  # fmt: skip
            except WorkerFailed as error:
                absent[name] = str(error)
                continue
            workers[name] = stack.enter_context(worker)
            facts[f"{name}, micro-batch"] = str(worker.facts["micro_batch"])
        products = stack.enter_context(Worker("products.py", f"--model={arguments.model}", threads=arguments.threads))

        rows = training_rows(rng, arguments.batch * arguments.steps, arguments.length, arguments.labels, head[0])
        rates: dict[str, list[float]] = {name: [] for name in (*servers, *workers)}
        for number in range(arguments.rounds + 1):
            steps = arguments.steps if number else 1
            for name, server in servers.items():
                job = server.start_job(rows, arguments.batch, steps, arguments.rank)
                job.wait_steps(steps)
                _note(rates, name, number, step_rate(job.events("started", "step")))
                job.wait_end()
            for name, worker in workers.items():
                if number:  # it has warmed up when it started
                    answer = worker.ask(steps=steps)
                    _note(rates, name, number, answer["tokens"] / answer["seconds"])
        floors = _floors(products, share, work)

    facts["load after"] = load_average()
    flops = {name: 2 * ((w[0] + w[1]) * size["layers"] + (w[2] + w[3]) * size["head"]) for name, w in work.items()}
    medians = {name: median(found) for name, found in rates.items()}
    report = Report(
        f"Training alone: rank {arguments.rank}, batches of {arguments.batch} x {arguments.length} tokens, "
        f"{arguments.labels} with a loss, float32",
        ["system", "tokens/s", "loss tokens/s", "÷ PEFT", "MFLOP a token", "PEFT's FLOP ÷ its", "floor tokens/s",
         "÷ floor"], facts,
    )  # fmt: skip
    for name in rates:
        rate = medians[name]
        report.rows.append(
            [name, rate, rate and rate * share, ratio(rate, medians.get("PEFT")), flops[name] / 1e6,
             flops["PEFT"] / flops[name], floors[name], ratio(rate, floors[name])]
        )  # fmt: skip
    report.notes = [f"{name} could not be measured: {reason}" for name, reason in absent.items()]
    report.figures = {
        "rounds": rates, "median": medians, "flops_per_token": flops, "floor": floors, "absent": absent,
        "shape": {k: getattr(arguments, k) for k in ("length", "labels", "batch", "rank", "steps")},
    }  # fmt: skip
    report.emit(arguments.json)


def _note(rates: dict[str, list[float]], name: str, number: int, rate: float | None) -> None:
    if number and rate is not None:  # the first round warms up
        rates[name].append(rate)
        say(f"round {number}, {name}: {rate:.1f} tokens/s")


def _floors(products: Worker, share: float, work: dict[str, tuple[float, float, float, float]]) -> dict[str, float]:
    """Tokens a second if a system did its products and nothing else."""
    forward, backward = (
        products.ask(rows=WINDOW, part="layers", transposed=t)["seconds"] / WINDOW for t in (False, True)
    )
    head, head_back = (
        products.ask(rows=HEAD_ROWS, part="head", transposed=t)["seconds"] / HEAD_ROWS for t in (False, True)
    )
    costs = (forward, backward, head, head_back)
    return {name: 1 / sum(n * cost for n, cost in zip(w, costs, strict=True)) for name, w in work.items()}


if __name__ == "__main__":
    main()
