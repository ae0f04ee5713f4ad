"""How much longer than predicted an iteration may take: the other half of the latency model.

It may assume that predictions are right on average (the model's half). It knows by how many seconds they were missed,
and never what an iteration did beyond its kind.

    upper = boost · (mean + margin(kind)) + deviation

The deviation is what the model does not know of its coefficients. A margin is a quantile of what recent iterations took
beyond their mean, in seconds: on a machine shared with other processes most of that are stalls of 15 to 45 ms, which
come to long and short iterations alike (a margin in per cent grew when iterations became shorter for it, and then left
no room at all). Iterations beside streams and those of training alone have windows of their own, because clients cause
stalls. Prompts use a smaller quantile than training: a late token costs less than first tokens that wait.

After an iteration longer than its upper estimate boost grows by the same ratio (at most 1.5x at once); it halves with
every iteration that was not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

KINDS = ("decode", "prompt", "training", "alone")  # of iterations: the last one has no request in it
_KEPT = 400  # iterations: half a minute beside streams on a CPU, a few seconds on a GPU
_UNKNOWN = (-0.05, 0.0, 0.05, 0.1, 0.2)  # of the mean: taken for known before the first measurements
_LARGEST = 1.0  # of the mean
_LARGEST_BOOST = 3.0
_FAR = 1.2  # an iteration so much longer than its upper estimate was not foreseen at all


@dataclass(frozen=True, slots=True)
class Errors:
    """Of the last iterations: how wrong the model was. Shares 0 … 1."""

    iterations: int
    median: float  # of |measured ÷ predicted − 1|
    over: float  # longer than the upper estimate
    far_over: float  # longer than it by more than 20%


class Margins:
    def __init__(self, quantile: float, prompt_quantile: float) -> None:
        self._quantiles = (quantile, prompt_quantile)
        self._missed: dict[bool, deque[float]] = {}  # alone or not -> seconds beyond the mean
        self._margins = dict.fromkeys(KINDS, 0.0)
        self._boost = 1.0
        self._judged: deque[tuple[float, float]] = deque(maxlen=1000)  # (measured ÷ mean, measured ÷ upper)

    def upper(self, kind: str, mean: float, deviation: float) -> float:
        return self._boost * (mean + self._margins[kind]) + deviation

    @property
    def boost(self) -> float:
        """What an upper estimate multiplies seconds by, just now."""
        return self._boost

    def observe(self, kind: str, mean: float, upper: float, seconds: float) -> None:
        """An iteration of `kind` was predicted to take `mean` and at most `upper` seconds, and took `seconds`."""
        if mean <= 0.0 or upper <= 0.0:
            return
        self._judged.append((seconds / mean, seconds / upper))
        alone = kind == "alone"
        missed = self._missed.get(alone)
        if missed is None:
            missed = self._missed[alone] = deque((share * mean for share in _UNKNOWN), _KEPT)
        missed.append(min(seconds - mean, _LARGEST * mean))
        most, some = (max(0.0, float(m)) for m in np.quantile(np.array(missed), self._quantiles))
        if alone:
            self._margins["alone"] = most
        else:
            self._margins.update(decode=most, training=most, prompt=some)
        if seconds > upper:
            self._boost = min(_LARGEST_BOOST, self._boost * min(1.5, seconds / upper))
        else:
            self._boost = 1.0 + 0.5 * (self._boost - 1.0)

    @property
    def errors(self) -> Errors:
        judged = np.array(self._judged).reshape(-1, 2)
        if not len(judged):
            return Errors(0, 0.0, 0.0, 0.0)
        median = float(np.median(np.abs(judged[:, 0] - 1.0)))
        return Errors(len(judged), median, float(np.mean(judged[:, 1] > 1.0)), float(np.mean(judged[:, 1] > _FAR)))
