"""A LoRA training loop as one writes it with PEFT and torch's AdamW; with --checkpointing, transformers' gradient
checkpointing.

The batch runs in micro-batches, all of one length, so that nothing is padded; which micro-batch is quickest is found
out at start.

    {"steps": 2}  ->  {"seconds": …, "tokens": …}
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from lines import Lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    lines = Lines()

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    config = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear")
    model = get_peft_model(base, config)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)

    def step(micro: int, batch: int = arguments.batch) -> None:
        ids = torch.randint(3, base.config.vocab_size, (batch, arguments.length))
        labels = ids.clone()
        labels[:, : arguments.length - arguments.labels] = -100
        for first in range(0, batch, micro):
            rows = slice(first, first + micro)
            loss = model(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss
            (loss * ids[rows].shape[0] / batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def timed(micro: int, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step(micro)
        return time.perf_counter() - began

    candidates = sorted({min(m, arguments.batch) for m in arguments.micro_batches})
    step(1, batch=1)
    best = min(candidates, key=lambda micro: timed(micro, 1)) if len(candidates) > 1 else candidates[0]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        steps = request["steps"]
        return {"seconds": timed(best, steps), "tokens": steps * arguments.batch * arguments.length}

    lines.serve({"micro_batch": best}, answer)


if __name__ == "__main__":
    main()
