"""How many prompt tokens run beside the decodes: the most that keep running streams inside their budget.

It may assume that candidates come in the order in which they run. It never plans training, and what it plans depends on
none but what is owed its floor: otherwise prompts come first.

The candidates' tokens count together, so several prompts share an iteration, the last of them cut where the budget
ends. A prompt that is alone is cut into as many chunks, but equal ones: fewer iterations are filled to the brim.
Without running streams nothing needs protection and the chunk is as large as it may be. When nothing fits, `min_chunk`
tokens run all the same if a first token would otherwise be late, a candidate's or that of a prompt behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from math import inf

from coserve.scheduler.admission import Candidate
from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.features import ForwardLoad
from coserve.scheduler.search import largest
from coserve.scheduler.state import RequestState
from coserve.scheduler.traits import Traits

Candidates = tuple[Candidate, ...]


class ChunkPolicy:
    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._traits = Traits(config.layer_windows, config.graph_rows, config.usual_pages)

    def tokens(
        self, now: float, candidates: Candidates, beside: ForwardLoad, adapters: Collection[str], budget: float,
        seconds: Callable[[ForwardLoad], float], behind: Iterable[RequestState] = (),
    ) -> int:  # fmt: skip
        """Prompt tokens of this iteration, all candidates together. `beside`: the packed forward without them, and
        `adapters` of its decodes; `seconds(load)`: upper estimate of an iteration; `behind`: prompts that wait for
        nothing but the candidates."""
        total = min(self._config.max_chunk, sum(c.tokens for c in candidates))
        if total == 0 or beside.rows == 0:
            return total

        def cost(tokens: int) -> float:
            return seconds(with_chunks(beside, candidates, tokens, adapters, self._traits))

        found = largest(total, budget, cost)
        if found:
            if len(candidates) > 1:  # others' tokens fill the last chunk up
                return found
            left = candidates[0].request.total_tokens - candidates[0].request.computed_tokens
            return -(-left // -(-left // found))
        least = min(self._config.min_chunk, total)
        each = cost(least)
        ahead = 0
        for c in candidates:
            ahead += c.request.total_tokens - c.request.computed_tokens
            if now + -(-ahead // least) * each >= c.request.ttft_deadline:
                return least
        due = min((r.ttft_deadline for r in behind), default=inf)
        return least if now + -(-ahead // least) * each >= due else 0


def cut(candidates: Candidates, tokens: int) -> list[tuple[Candidate, int]]:
    """The first `tokens` tokens of the candidates' chunks, in order."""
    pieces = []
    for c in candidates:
        if tokens <= 0:
            break
        n = min(c.tokens, tokens)
        pieces.append((c, n))
        tokens -= n
    return pieces


def with_chunks(
    decodes: ForwardLoad, candidates: Candidates, tokens: int, adapters: Collection[str], traits: Traits
) -> ForwardLoad:
    """The packed forward with the first `tokens` tokens of the candidates; `adapters`: of the decodes."""
    rows = finished = passed = 0
    work = 0.0
    more = {}
    for c, n in cut(candidates, tokens):
        r = c.request
        rows += n
        work += traits.work(r.computed_tokens, n)
        finished += r.computed_tokens + n >= r.total_tokens
        if r.adapter is not None:
            passed += n * r.adapter_pages
            if r.adapter not in adapters:
                more[r.adapter] = r.adapter_pages
    if not rows:
        return decodes
    usual = traits.usual_pages
    return decodes.with_prefill(rows, work, finished, len(more), sum(more.values()) / usual, passed / usual)


def first_token_slack(now: float, candidates: Candidates, tokens: int, seconds: float) -> float:
    """Seconds this iteration may last so that no first token of `candidates` is late: those that end in it are due at
    its end, the others need (tokens ahead of them) / (tokens an iteration) more iterations of `seconds`."""
    slack = float("inf")
    ahead = -tokens
    for c in candidates:
        ahead += c.request.total_tokens - c.request.computed_tokens
        more = -(-ahead // max(tokens, 1)) * seconds if ahead > 0 else 0.0
        slack = min(slack, c.request.ttft_deadline - now - more)
    return slack
