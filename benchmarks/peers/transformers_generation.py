"""transformers' own generation: `generate` over a left-padded batch, or with --continuous its continuous batching.

{"prompts": [[ids]], "new_tokens": 64}  ->  {"seconds": …, "tokens": …}
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
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--most-requests", type=int, default=16)
    arguments = parser.parse_args()
    lines = Lines()

    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    # No end-of-sequence token: every system generates exactly as many tokens as are asked for.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)

    @torch.inference_mode()
    def padded(prompts: list[list[int]], new_tokens: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens)
        return (out.shape[1] - longest) * len(prompts)

    # Its cache is sized for the requests of the benchmark; by default it would take most of the memory.
    batching = ContinuousBatchingConfig(
        num_blocks=4 * arguments.most_requests, max_batch_tokens=1024, max_requests_per_batch=arguments.most_requests
    )

    def continuous(prompts: list[list[int]], new_tokens: int) -> int:
        generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=new_tokens)
        found = model.generate_batch(
            prompts, generation_config=generation, continuous_batching_config=batching, persistent_manager=True
        )
        errors = [output.error for output in found.values() if output.error]
        if errors or len(found) != len(prompts):
            raise RuntimeError(f"continuous batching finished {len(found)} of {len(prompts)} requests: {errors[:1]}")
        return sum(len(output.generated_tokens) for output in found.values())

    run = continuous if arguments.continuous else padded

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        tokens = run(request["prompts"], request["new_tokens"])
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    lines.serve({}, answer)


if __name__ == "__main__":
    main()
