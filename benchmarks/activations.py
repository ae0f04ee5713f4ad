"""Activation bytes a trained token: coserve's two policies against plain autograd and transformers' checkpointing.

    python benchmarks/activations.py --model FOLDER [--json FILE]

One optimizer step's gradients of a LoRA of rank 16 on all linear layers, float32 on a CPU, head included. Every row
is measured in one way: the running sum of the profiler's allocation and deallocation events of a second, identical
pass. What exists before it (weights, optimizer state, the adapter's gradients) is therefore not counted. "stored" is
the sum between forward and backward, "peak" the largest sum of the pass. Bytes that a library takes without torch's
allocator (a product's scratch space) are seen in no row. What coserve keeps of the layers lies in blocks of its K/V
cache, which are there before the pass: they are added whole, from the pass's begin to its end.

coserve's units are those of its engine: windows, head units of 64 label rows, a layer's window at a time backward.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Report, environment, load_average, machine, parser, ratio, say

STORED = "activations: stored"  # the mark between forward and backward
Mark = Callable[[], None]
System = tuple[Callable[[Mark], None], int]  # a pass, and the bytes that are kept for it outside of torch's allocator


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    options.add_argument("--labels", type=int, default=128, help="of them that bear a loss")
    options.add_argument("--sequences", type=int, default=1)
    options.add_argument("--window", type=int, default=256, help="coserve's rows of a forward or backward window")
    options.add_argument("--head-rows", type=int, default=64)
    options.add_argument("--rank", type=int, default=16)
    arguments = options.parse_args()
    # OpenMP reads its settings when torch is loaded.
    os.environ.update(environment(arguments.threads))
    import torch

    torch.set_num_threads(arguments.threads)
    facts = machine(arguments.threads)
    systems = {
        "plain autograd (PEFT)": lambda: _peft(arguments, checkpointing=False),
        "gradient checkpointing (PEFT)": lambda: _peft(arguments, checkpointing=True),
        "coserve, save": lambda: _coserve(arguments, save=True),
        "coserve, recompute": lambda: _coserve(arguments, save=False),
    }
    tokens = arguments.sequences * arguments.length
    found: dict[str, dict[str, float]] = {}
    for name, build in systems.items():
        say(name)
        run, blocks = build()
        run(lambda: None)
        found[name] = {key: (value + blocks) / tokens for key, value in _measure(run).items()}

    facts["load after"] = load_average()
    report = Report(
        f"Activation memory: {arguments.sequences} x {arguments.length} tokens, {arguments.labels} with a loss, "
        f"windows of {arguments.window}, rank {arguments.rank}, float32",
        ["system", "stored KiB a token", "peak KiB a token", "autograd's stored ÷ its", "autograd's peak ÷ its"], facts,
    )  # fmt: skip
    plain = found["plain autograd (PEFT)"]
    for name, row in found.items():
        ratios = [ratio(plain[key], row[key]) for key in ("stored", "peak")]
        report.rows.append([name, row["stored"] / 1024, row["peak"] / 1024, *ratios])
    shape = {key: getattr(arguments, key) for key in ("length", "labels", "sequences", "window", "head_rows", "rank")}
    report.figures = {"bytes_per_token": found, "shape": shape}
    report.emit(arguments.json)


def _measure(run: Callable[[Mark], None]) -> dict[str, float]:
    """{"stored": bytes, "peak": bytes} of one pass."""
    from torch.profiler import ProfilerActivity, profile, record_function

    def mark() -> None:
        with record_function(STORED):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(mark)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    total = peak = stored = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
        elif event.name() == STORED:
            stored = total
    return {"stored": stored, "peak": peak}


def _rows(arguments: argparse.Namespace, vocabulary: int) -> tuple[Any, Any]:
    """input_ids and labels, int64 [sequences, length]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (arguments.sequences, arguments.length), generator=generator)
    labels = ids.clone()
    labels[:, : arguments.length - arguments.labels] = -100
    return ids, labels


# --------------------------------------------------------------------------- the systems


def _peft(arguments: argparse.Namespace, *, checkpointing: bool) -> System:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    config = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear")
    model = get_peft_model(base, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    ids, labels = _rows(arguments, base.config.vocab_size)

    def run(mark: Mark) -> None:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        mark()
        loss.backward()

    return run, 0


class _Adapter:
    """A training copy of LoRA pairs at every linear layer."""

    def __init__(self, sites: Any, rank: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._pairs = {
            site.name: tuple(
                torch.randn(rank, n, generator=generator) * 0.01 for n in (site.in_features, site.out_features)
            )
            for site in sites
        }

    def pair(self, site: Any) -> tuple[Any, Any, float]:
        a, b = self._pairs[site.name]
        return a, b, 2.0


def _coserve(arguments: argparse.Namespace, *, save: bool) -> System:
    from coserve.server.engine.activation_store import private_store
    from coserve.server.engine.backward import run_backward_unit
    from coserve.server.engine.forward import PackedPass, SweepPart, finish_window, run_packed
    from coserve.server.engine.head import run_head_unit
    from coserve.server.engine.job_step import JobStep, TrainSequence
    from coserve.server.engine.load import load_model
    from coserve.server.engine.options import EngineOptions
    from coserve.server.engine.sweep import Sweep

    model = load_model(EngineOptions(str(arguments.model), Path(), "", device="cpu", dtype="float32")).base
    ids, labels = _rows(arguments, model.vocab_size)
    count = arguments.sequences * arguments.labels
    # One step for all passes, so that its gradients are there before the measured one, as PEFT's are.
    step = JobStep("job", _Adapter(model.sites, arguments.rank), count)
    sequences = [
        TrainSequence(step, i.numpy(), row.numpy(), n) for n, (i, row) in enumerate(zip(ids, labels, strict=True))
    ]

    store = private_store(model, ids.numel(), save)

    def run(mark: Mark) -> None:
        sweep = Sweep(sequences, layers=model.layer_count, dtype=model.dtype, device=model.device, save=save)
        sweep.place(store)
        while not sweep.forward_done:
            start = sweep.forward_rows
            end = min(start + arguments.window, sweep.rows)
            packed = PackedPass([SweepPart(sweep, start, end, model.backend)], model.backend)
            finish_window(sweep, run_packed(model, sweep.ids[start:end], sweep.positions[start:end], packed))
        mark()
        while sweep.head_left:
            run_head_unit(model, sweep, arguments.head_rows)
        while not sweep.done:
            run_backward_unit(model, sweep, arguments.window)

    return run, store.held_bytes


if __name__ == "__main__":
    main()
