"""transformers' continuous batching on a model at hand, in this process: seconds of a decode step.

It notes the time of every token. A step is the stretch between two tokens of a request while all requests of the
round have their first token and none has its last: prompts and ends of requests are in no figure.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Sequence
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

_PAGE = 256
BATCH_TOKENS = 4096  # of an iteration: prompts are through quickly, and its decode steps do not depend on it


class ContinuousBatching:
    """Takes the model over. `longest` is the most tokens of a sequence."""

    def __init__(self, model: Any, most_requests: int, longest: int) -> None:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._model = model
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
        # Its cache is sized for the benchmark's requests; by default it would take most of the memory.
        self._batching = ContinuousBatchingConfig(
            num_blocks=most_requests * (-(-longest // _PAGE) + 1), max_requests_per_batch=most_requests,
            max_batch_tokens=min(BATCH_TOKENS, most_requests * longest),
        )  # fmt: skip
        self._times([[5, 6, 7, 8]], 4)

    @property
    def attention(self) -> str:
        return str(self._model.config._attn_implementation)

    def step_seconds(self, prompts: Sequence[list[int]], new_tokens: int, steps: int) -> float:
        """Median of the last `steps` steps at the most. Prompts must be fresh, or a prefix cache finds them."""
        times = self._times(prompts, new_tokens)
        begin, end = max(t[0] for t in times), min(t[-1] for t in times)
        seconds = [
            after - before
            for of_request in times
            for before, after in list(itertools.pairwise(t for t in of_request if begin < t < end))[-steps:]
        ]
        if not seconds:
            raise RuntimeError("its requests were never all in decode at once")
        return statistics.median(seconds)

    def close(self) -> None:
        self._model.destroy_cached_continuous_batching_manager()

    def _times(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        """When each token of each request was there."""
        generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=new_tokens)
        found = self._model.generate_batch(
            prompts, generation_config=generation, continuous_batching_config=self._batching, persistent_manager=True,
            progress_bar=False, record_timestamps=True, max_new_tokens=new_tokens,
        )  # fmt: skip
        errors = [output.error for output in found.values() if output.error]
        tokens = sum(len(output.generated_tokens) for output in found.values())
        if errors or tokens != len(prompts) * new_tokens:
            raise RuntimeError(f"it made {tokens} tokens of {len(prompts) * new_tokens}: {errors[:1]}")
        return [list(output.timestamps) for output in found.values()]
