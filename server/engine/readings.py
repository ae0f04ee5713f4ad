"""What the rows of requests said after a packed forward: log-probabilities and new tokens, before anything is booked.

On CUDA reading means to wait for the device, so it is done in two steps: `begin` puts the work into the device's queue
and starts one copy into pinned memory; `take`, after everything else of the iteration is queued too, waits for it and
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coserve.kernels.transfer import integers
from coserve.server.engine.model import BaseModel
from coserve.server.engine.requests import Request
from coserve.server.engine.sampler import Sampled, SamplingRow, choose, chosen_on_device, sample, token_logprobs
from coserve.server.wire.messages import TokenLogprob

LOGIT_ROWS = 64  # logit rows at a time: a row of a 262k vocabulary is a megabyte


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one request."""

    request: Request
    rows: int
    finite: bool
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    sampled: Sampled | None = None  # None: its tokens have not all run


class PendingReadings:
    """The generation rows of one packed forward, on their way to the host."""

    def __init__(self, model: BaseModel, scheduled: Sequence[tuple[Request, int]], hidden: Tensor) -> None:
        """hidden: [rows, H], the output of the last layer, in the order of `scheduled` (request, rows)."""
        self._model, self.scheduled, self._hidden = model, list(scheduled), hidden
        ends, row = [], 0
        self._ending: list[Request] = []
        for request, rows in scheduled:
            row += rows
            if request.computed + rows == len(request.tokens):
                ends.append(row - 1)
                self._ending.append(request)
        self._ends = integers(ends, hidden.device, torch.int64)
        self._known: Tensor | None = None  # logits of all rows
        self._sums: Tensor | None = None
        self._tokens: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self, logits: Tensor | None = None) -> None:
        """Queue what can be chosen on the device, and its copy to the host. Where device and host are one, nothing is.

        Args:
            logits: [rows, vocabulary], if they are known already.
        """
        self._known = logits
        if self._hidden.device.type != "cuda":
            return
        self._sums = _to_host(self._hidden.sum(-1, dtype=torch.float32))
        if self._ending and all(chosen_on_device(request.row) for request in self._ending):
            self._tokens = _to_host(torch.cat([
                choose(self._logits(chunk), self._rows(chunk))
                for chunk in self._chunks()
            ]))  # fmt: skip
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self._hidden.device))

    def take(self) -> list[Reading]:
        """Waits until the device has come to what `begin` queued, and for nothing that was queued behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        finite = self._finite()
        if not all(finite):
            self._drop({request.id for (request, _), sound in zip(self.scheduled, finite, strict=True) if not sound})
        sampled = self._sampled()
        readings, row = [], 0
        for (request, rows), sound in zip(self.scheduled, finite, strict=True):
            of_request = self._hidden[row : row + rows]
            row += rows
            wants = sound and request.wants_prompt_logprobs
            logprobs = self._prompt_logprobs(request, of_request) if wants else []
            readings.append(Reading(request, rows, sound, logprobs, sampled.get(request.id)))
        return readings

    def _finite(self) -> list[bool]:
        """Whether each request's values are. A sum that is finite says so of what was summed."""
        if self._sums is None:
            if bool(torch.isfinite(self._hidden.sum())):
                return [True] * len(self.scheduled)
            sums = self._hidden.sum(-1)
        else:
            sums = self._sums
        found, row = [], 0
        for _, rows in self.scheduled:
            of_request = slice(row, row + rows)
            row += rows
            sound = bool(torch.isfinite(sums[of_request]).all())
            found.append(sound or bool(torch.isfinite(self._hidden[of_request]).all()))
        return found

    def _drop(self, unsound: set[str]) -> None:
        """Nothing is sampled of these requests, or nobody will look at it."""
        if self._tokens is None:
            kept = [n for n, request in enumerate(self._ending) if request.id not in unsound]
            self._ending = [self._ending[n] for n in kept]
            self._ends = self._ends[integers(kept, self._ends.device, torch.int64)]

    def _sampled(self) -> dict[str, Sampled]:
        """By request."""
        if self._tokens is not None:
            return {r.id: Sampled(token) for r, token in zip(self._ending, self._tokens.tolist(), strict=True)}
        found: dict[str, Sampled] = {}
        for chunk in self._chunks():
            rows = self._rows(chunk)
            tokens = sample(self._logits(chunk), rows)
            found.update(zip((r.id for r in self._ending[chunk]), tokens, strict=True))
        return found

    def _chunks(self) -> list[slice]:
        return [slice(start, start + LOGIT_ROWS) for start in range(0, len(self._ending), LOGIT_ROWS)]

    def _rows(self, chunk: slice) -> list[SamplingRow]:
        return [request.row for request in self._ending[chunk]]

    def _logits(self, chunk: slice) -> Tensor:
        if self._known is not None:
            return self._known.index_select(0, self._ends[chunk])
        return self._model.logits(self._hidden.index_select(0, self._ends[chunk]))

    def _prompt_logprobs(self, request: Request, hidden: Tensor) -> list[TokenLogprob | None]:
        """hidden [rows, H] of a prompt chunk: row i predicts the token after it."""
        first = request.computed
        found: list[TokenLogprob | None] = [None] if first == 0 else []
        following = list(request.message.prompt_ids[first + 1 : first + 1 + hidden.shape[0]])
        top = request.message.sampling.prompt_logprobs or 0
        for start in range(0, len(following), LOGIT_ROWS):
            targets = following[start : start + LOGIT_ROWS]
            logits = self._model.logits(hidden[start : start + len(targets)])
            for entry in token_logprobs(logits, targets, top):
                found.append(TokenLogprob(entry.token_id, float(entry.logprob or 0.0), entry.top))
        return found


def _to_host(values: Tensor) -> Tensor:
    """A copy in pinned memory that is whole once the stream has come to it."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
