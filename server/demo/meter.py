"""What the live table is made of: rates from the server's counters, and gaps between pieces as a client sees them."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("decode", "prefill", "train_forward", "head", "train_backward")
_SAMPLE = re.compile(r'^(?P<name>[a-z_]+)(?:\{kind="(?P<kind>[a-z_]+)"\})? (?P<value>\S+)$', re.MULTILINE)
_TOKENS = "coserve_step_tokens_total"


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of /metrics: tokens so far by kind, and the promise between two tokens in seconds."""

    at: float
    tokens: Mapping[str, float]
    promise: float | None


def read_metrics(page: str, at: float) -> Sample:
    """The sample in a Prometheus text page; kinds that are not there count zero."""
    tokens = dict.fromkeys(KINDS, 0.0)
    promise = None
    for match in _SAMPLE.finditer(page):
        if match["name"] == _TOKENS and match["kind"] in tokens:
            tokens[match["kind"]] = float(match["value"])
        elif match["name"] == "coserve_slo_itl_seconds":
            promise = float(match["value"])
    return Sample(at, tokens, promise)


class Rates:
    """Tokens a second by kind over the last `window` seconds of samples."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].at <= sample.at - self._window:
            self._samples.popleft()

    @property
    def latest(self) -> Sample | None:
        return self._samples[-1] if self._samples else None

    def by_kind(self) -> dict[str, float]:
        return between(self._samples[0], self._samples[-1]) if self._samples else dict.fromkeys(KINDS, 0.0)


def between(first: Sample, last: Sample) -> dict[str, float]:
    """Tokens a second by kind between two samples; zeros if no time passed."""
    seconds = last.at - first.at
    if seconds <= 0:
        return dict.fromkeys(KINDS, 0.0)
    return {kind: max(0.0, last.tokens[kind] - first.tokens[kind]) / seconds for kind in KINDS}


@dataclass(slots=True)
class Gaps:
    """Seconds between a stream's pieces, with the time at which each ended; times must not go back."""

    _at: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    last_at: float | None = None
    pieces: int = 0

    def add(self, at: float, seconds: float | None) -> None:
        """A piece came at `at`, `seconds` after the one before; None for a stream's first piece."""
        self.last_at = at
        self.pieces += 1
        if seconds is not None:
            self._at.append(at)
            self._seconds.append(seconds)

    def seconds_since_last(self, now: float) -> float:
        return 0.0 if self.last_at is None else now - self.last_at

    def since(self, start: float, end: float = float("inf")) -> list[float]:
        """The gaps that ended in [start, end), in order of length."""
        return sorted(self._seconds[bisect_left(self._at, start) : bisect_left(self._at, end)])


def percentile(ordered: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed; None for no values."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
