"""The generation sequences in the engine's hands: their tokens, their blocks and their place in line.

A sequence is *waiting* (holds no blocks) or *running*. Preemption makes it wait again with the tokens it has; it
then runs them as a prompt and goes on exactly where it was. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from coserve.scheduler.state import RequestState
from coserve.server.engine.kv_cache import SequenceBlocks
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.sampler import Sampled, SamplingRow
from coserve.server.wire.messages import Generate, TokenLogprob, Tokens


@dataclass(slots=True)
class Request:
    """One sequence from admission to its last token."""

    message: Generate
    tokens: list[int]  # prompt, then what was generated
    output: list[int]  # what was generated; shared with `row`
    row: SamplingRow
    blocks: SequenceBlocks | None = None  # None: waiting
    cached_tokens: int | None = None  # prompt tokens that came from the prefix cache at first admission
    lost: int = 0  # tokens whose K/V it had when it was last preempted
    acquired: bool = False  # counts as in flight on its adapter
    chunk: int | None = None  # most prompt tokens at a time, once memory ran out under more
    first_token_at: float | None = None
    last_token_at: float | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.message.request_id

    @property
    def version(self) -> str:
        """Adapter version digest, "" for the base model: the key of the prefix cache."""
        return self.message.adapter.digest if self.message.adapter else ""

    @property
    def computed(self) -> int:
        return self.blocks.length if self.blocks else 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.message.sampling.prompt_logprobs is not None and not self.output


class RequestBook:
    """All sequences by id, in order of arrival, and the block manager that they draw on."""

    def __init__(
        self, blocks: BlockManager, itl_seconds: float, ttft_seconds: float, *,
        batch: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Promises of requests that bring none of their own; `batch`: (inter-token, first-token) of that class."""
        self.blocks = blocks
        promises = itl_seconds, ttft_seconds
        self._promises = {"interactive": promises, "batch": batch or promises}
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._requests)

    @property
    def running(self) -> int:
        return sum(r.blocks is not None for r in self._requests.values())

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def add(self, message: Generate) -> None:
        """A message that repeats the id of a live sequence is a resend and changes nothing."""
        if message.request_id in self._requests:
            return
        output: list[int] = []
        row = SamplingRow(message.sampling, message.prompt_ids, output)
        self._requests[message.request_id] = Request(message, list(message.prompt_ids), output, row)

    def admit(self, request: Request) -> int:
        """Waiting -> running: take what the prefix cache has of its tokens. Idempotent.

        Returns how many tokens will be computed again, because a preemption has lost their K/V.
        """
        if request.blocks is not None:
            return 0
        params = request.message.sampling
        left = params.max_tokens - len(request.output)
        request.blocks = self.blocks.admit(
            request.tokens, request.message.salt, request.version, expected_tokens=len(request.tokens) + left,
            reuse=not request.wants_prompt_logprobs, owner=request.message.tenant,
        )  # fmt: skip
        if request.cached_tokens is None:
            request.cached_tokens = request.blocks.cached_tokens
        return max(0, request.lost - request.blocks.cached_tokens)

    def preempt(self, request: Request) -> None:
        """Running -> waiting, all blocks given back."""
        if request.blocks is not None:
            request.lost = request.blocks.length
            self.blocks.release(request.blocks)
            request.blocks = None

    def remove(self, request: Request) -> None:
        self.preempt(request)
        self._requests.pop(request.id, None)

    def commit(self, request: Request, rows: int) -> None:
        """`rows` more of its tokens have their K/V in the cache."""
        if request.blocks is None:
            raise RuntimeError(f"{request.id} has no blocks")
        start = request.blocks.length
        self.blocks.commit(request.blocks, request.version, request.tokens[start : start + rows])

    def deliver(self, request: Request, sampled: Sampled, now: float) -> Tokens:
        """Take a sampled token; the reply says whether the sequence is finished. Does not remove it."""
        params = request.message.sampling
        request.tokens.append(sampled.token_id)
        request.output.append(sampled.token_id)
        stopped = sampled.token_id in params.stop_token_ids and len(request.output) > params.min_tokens
        reason = "stop" if stopped else "length" if len(request.output) >= params.max_tokens else None
        first = request.first_token_at is None
        if first:
            request.first_token_at = now
        request.last_token_at = now
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob, sampled.top),)
        return Tokens(
            request.id, (sampled.token_id,), reason, request.cached_tokens or 0, logprobs,
            tuple(request.prompt_logprobs) if first else (), stopped,
        )  # fmt: skip

    def state(self, request: Request, weight: float, adapter_ready: bool, adapter_pages: int = 0,
              adapter_kept_out: bool = False, blocks_adapter: int = 0) -> RequestState:  # fmt: skip
        """What the scheduler is told of a sequence."""
        message, last = request.message, request.last_token_at
        itl, ttft = self.promises(request)
        return RequestState(
            request_id=request.id,
            tenant=message.tenant,
            weight=weight,
            slo_class=message.slo_class,
            arrived=message.arrived,
            total_tokens=len(request.tokens),
            computed_tokens=request.computed,
            output_tokens=len(request.output),
            blocks_held=len(request.blocks.blocks) if request.blocks else 0,
            adapter=request.version or None,
            adapter_ready=adapter_ready,
            ttft_deadline=message.arrived + ttft,
            itl_deadline=None if last is None else last + itl,
            running=request.blocks is not None,
            blocks_shared=self._shared(request),
            adapter_pages=adapter_pages,
            adapter_kept_out=adapter_kept_out,
            blocks_adapter=blocks_adapter,
            most_output=message.sampling.max_tokens,
            deadline=message.deadline,
        )

    def promises(self, request: Request) -> tuple[float, float]:
        """(inter-token, first-token) seconds: its own, or else its class's."""
        message = request.message
        itl, ttft = self._promises["batch" if message.slo_class == "batch" else "interactive"]
        return (
            itl if message.itl_seconds is None else message.itl_seconds,
            ttft if message.ttft_seconds is None else message.ttft_seconds,
        )

    def own_blocks(self, request: Request) -> int:
        """Blocks that its end will free."""
        return len(request.blocks.blocks) - self.blocks.shared_blocks(request.blocks) if request.blocks else 0

    def _shared(self, request: Request) -> int:
        """Blocks that a preemption of `request` would not free. Only asked where blocks are short."""
        if request.blocks is None or self.blocks.free_blocks > self.blocks.num_blocks // 8:
            return 0
        return self.blocks.shared_blocks(request.blocks)
