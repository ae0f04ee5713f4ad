"""Every message that crosses the socket between gateway and engine, as frozen dataclasses.

Both sides import this module and nothing of each other. Times are seconds of CLOCK_MONOTONIC, which all
processes of one machine share. Paths are relative to the data directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# --------------------------------------------------------------------------- gateway -> engine


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled; the gateway has validated every field."""

    max_tokens: int
    seed: int  # always given: the gateway draws one where the client does not
    choice: int = 0  # index among the n choices; part of the random stream's key
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()  # any of these ends the sequence ("stop"); already without EOS if ignore_eos
    logprobs: int | None = None  # how many alternatives beside the sampled token; None: no logprobs at all
    prompt_logprobs: int | None = None  # the same for every prompt token (echo with logprobs)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable adapter version."""

    digest: str  # hex SHA-256 over base digest, canonical config and sorted tensors
    path: str  # PEFT folder, relative to the data directory


@dataclass(frozen=True, slots=True)
class TenantShare:
    """What a tenant may have of an engine: its weight among the others, and parts (0 … 1) of what all hold together."""

    weight: float = 1.0
    kv: float = 1.0  # of the K/V blocks, in use by its requests
    prefix: float = 1.0  # of the K/V blocks, kept by the prefix cache beyond those in use
    adapters: float = 1.0  # of the adapter pool's pages, in use by its requests


@dataclass(frozen=True, slots=True)
class Generate:
    """Start one sequence. A request with n choices is n of these."""

    request_id: str  # unique a choice
    tenant: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None
    salt: str  # tenant salt and the client's cache_salt: no prefix is shared across salts
    arrived: float
    slo_class: str = "interactive"  # or "batch"
    ttft_seconds: float | None = None  # promised from arrival to the first token; None: the engine's promise
    itl_seconds: float | None = None  # promised between two tokens; likewise
    share: TenantShare = TenantShare()
    deadline: float | None = None  # when it is to be ended, finished or not; None: never


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class StartJob:
    """Run, or go on with, the job whose jobs/<id>/spec.json and tokens/ are complete. Idempotent."""

    job_id: str
    tenant: str
    share: TenantShare = TenantShare()


@dataclass(frozen=True, slots=True)
class StopJob:
    """Stop a job at the next unit. pause=True keeps a checkpoint to go on from; else it is cancelled. Idempotent."""

    job_id: str
    pause: bool


@dataclass(frozen=True, slots=True)
class CheckAdapter:
    """Read and check the PEFT folder at `path` against the base model; answered by AdapterChecked."""

    call_id: int
    path: str


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """A deleted version: its files may go once no request uses it; answered by AdapterDropped."""

    call_id: int
    digest: str


@dataclass(frozen=True, slots=True)
class PinAdapters:
    """These versions, and no others, are to stay in the engine's adapter memory; answered by AdaptersPinned.

    Where not all fit, those that come first have precedence.
    """

    call_id: int
    versions: tuple[AdapterRef, ...]


@dataclass(frozen=True, slots=True)
class GetIterations:
    call_id: int
    limit: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish running requests, take no new ones, checkpoint jobs, then send Drained."""

    grace_seconds: float


# --------------------------------------------------------------------------- engine -> gateway


@dataclass(frozen=True, slots=True)
class EngineReady:
    """First message on every connection, sent when the engine can take work."""

    pid: int
    base_digest: str
    model_type: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    kv_blocks: int
    block_size: int
    lora_sites: tuple[str, ...]  # names of the modules an adapter may target, without layer prefix ("q_proj", …)
    slo_itl_seconds: float
    slo_ttft_seconds: float
    slo_batch_itl_seconds: float
    slo_batch_ttft_seconds: float
    running_requests: tuple[str, ...] = ()
    running_jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one sequence; the last one has a finish reason. A stop token is included as the last id."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None  # "stop" | "length" | None
    cached_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token when asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # sent once, with the first tokens; entry 0 is None
    stop_token: bool = False  # the last token id is a stop token: not part of the visible text


DEADLINE_EXCEEDED = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence that ended without a result."""

    request_id: str
    code: str  # an error code of the HTTP API, e.g. "adapter_invalid", "context_length_exceeded"
    message: str

    @classmethod
    def past_deadline(cls, sequence: Generate) -> Failed:
        """What its reader is told when a sequence is ended at its deadline."""
        had = (sequence.deadline or sequence.arrived) - sequence.arrived
        text = (
            f"The request was not finished within the {had:g} s that it had. Ask for fewer tokens, ask when less is "
            "running, or let it have more time with 'request_timeout_seconds', as far as your terms allow."
        )
        return cls(sequence.request_id, DEADLINE_EXCEEDED, text)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of jobs/<id>/events.jsonl, pushed as it is appended. The file is the truth; this is the news of it."""

    job_id: str
    seq: int
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterChecked:
    call_id: int
    error: str | None  # names the tensor or field, and the remedy
    param: str | None
    digest: str = ""
    rank: int = 0
    bytes: int = 0
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterDropped:
    call_id: int


@dataclass(frozen=True, slots=True)
class AdaptersPinned:
    """Sent once each version is resident or refused."""

    call_id: int
    refused: dict[str, str]  # digest -> why


@dataclass(frozen=True, slots=True)
class Iterations:
    call_id: int
    data: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """One sequence that waits in the engine."""

    request_id: str
    position: int  # 1: the next one
    reason: str
    wait_seconds: float | None  # expected; None: nothing to go by


@dataclass(frozen=True, slots=True)
class JobReport:
    """What the engine expects of a job; nothing where it says for what the job still waits."""

    job_id: str
    tokens_per_second: float | None = None  # that it trains now
    seconds: float | None = None  # from this report to the job's end
    waits: str | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """Sent about once a second, also when idle, and within 0.2 s of a change of the sequences or of their blocks: the
    heartbeat, and what /metrics shows of the engine.

    `counters` only grow, `gauges` are current values; names are those of the metric catalogue
    (server/telemetry), labels are written `name{key="value"}`. `itl` and `ttft` are the raw
    samples, in seconds, since the last Stats, as (slo_class, seconds). `queued` are the sequences that wait, in the
    order in which they would be admitted now, and `jobs` those that are here.
    """

    time: float
    counters: dict[str, float]
    gauges: dict[str, float]
    itl: tuple[tuple[str, float], ...] = ()
    ttft: tuple[tuple[str, float], ...] = ()
    queued: tuple[QueuedRequest, ...] = ()
    jobs: tuple[JobReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Drained:
    pass


MESSAGES: tuple[type, ...] = (
    Generate, Abort, StartJob, StopJob, CheckAdapter, DropAdapter, PinAdapters, GetIterations, Drain,
    EngineReady, Tokens, Failed, JobEvent, AdapterChecked, AdapterDropped, AdaptersPinned, Iterations, Stats, Drained,
)  # fmt: skip
