"""A burst beside a finetuning job: how soon training makes way for streams, and how soon it is back.

    python benchmarks/burst.py --model FOLDER [--json FILE]

One stream and a job; seven more streams come at once, bring one completion each and are gone. Counted are the
iterations that ended after the promise of a running stream, and the seconds from the last of the seven's last token to
the next iteration with training in it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from harness import Report, load_average, machine, parser, say, weight_shapes
from live import Server, random_prompts, training_rows

MORE, PROMPT, NEW_TOKENS = 7, 64, 64
Iteration = dict[str, Any]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quiet", type=float, default=10, help="seconds before and after a burst")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    options.add_argument("--labels", type=int, default=64)
    options.add_argument("--batch", type=int, default=4, help="sequences of an optimizer step")
    arguments = options.parse_args()
    facts, rng, vocabulary = machine(arguments.threads), random.Random(0), weight_shapes(arguments.model)[1][0]
    prompts = random_prompts(rng, PROMPT, vocabulary)
    rows = training_rows(rng, 64 * arguments.batch, arguments.length, arguments.labels, vocabulary)
    bursts: list[dict[str, Any]] = []
    with Server(arguments.model, arguments.threads) as server:
        job = server.start_job(rows, arguments.batch, 10**6)
        try:
            job.wait_steps(1)
            for number in range(arguments.rounds):
                say(f"burst {number + 1}")
                bursts.append(burst(server, prompts, arguments.quiet))
        finally:
            job.cancel()
    facts["load after"] = load_average()
    report = Report(
        f"Burst: from 1 stream to {1 + MORE} beside a job, and back",
        ["burst", "promise ms", "iterations", "over the promise", "longest ms", "all decode after, s",
         "training tokens/s before", "during", "training back after, s"], facts,
    )  # fmt: skip
    report.rows = [[number, *values.values()] for number, values in enumerate(bursts, 1)]
    report.figures = {"bursts": bursts}
    report.emit(arguments.json)


def burst(server: Server, prompts: Iterator[list[int]], quiet: float) -> dict[str, Any]:
    over = threading.Event()
    lone = threading.Thread(target=server.load, args=(1, quiet, prompts, NEW_TOKENS, over.is_set, 3600.0))
    lone.start()
    try:
        time.sleep(quiet)
        began = time.time()
        server.generate([next(prompts) for _ in range(MORE)], NEW_TOKENS)
        ended = time.time()
        time.sleep(quiet)
    finally:
        over.set()
        lone.join()
    before, during, after = (
        server.iterations(*times) for times in ((began - quiet, began), (began, ended), (ended, ended + quiet))
    )
    streams = [record for record in during if record["streams"]]
    all_decode = [r["started_at"] - began for r in during if r["tokens"]["decode"] > MORE]
    back = [r["started_at"] - ended for r in after if training_tokens(r)]
    return {
        "promise_ms": 1e3 * server.metrics()["coserve_slo_itl_seconds"], "iterations": len(streams),
        "over": sum(r["measured_s"] > r["slo_budget_s"] for r in streams),
        "longest_ms": 1e3 * max(r["measured_s"] for r in streams),
        "all_decode_s": all_decode[0] if all_decode else None,
        "training_before": training_rate(before), "training_during": training_rate(during),
        "back_s": back[0] if back else None,
    }  # fmt: skip


def training_tokens(record: Iteration) -> float:
    return sum(record["tokens"][kind] for kind in ("train_forward", "head", "train_backward"))


def training_rate(records: Sequence[Iteration]) -> float | None:
    """Tokens a second that went through the whole backward."""
    if len(records) < 2:
        return None
    seconds = records[-1]["started_at"] + records[-1]["measured_s"] - records[0]["started_at"]
    return sum(record["tokens"]["train_backward"] for record in records) / seconds


if __name__ == "__main__":
    main()
