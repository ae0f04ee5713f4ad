"""How long will this iteration take? A linear model over plan features, learned while serving.

It may assume that observations come from one machine whose speed drifts; it never forgets what it learned about shapes
that it has not seen for a while.

    seconds(plan) = Σ over parts p of  θ · x_p        (overhead, packed forward, every unit)

θ ≥ 0 is estimated by recursive least squares:

    e = y − θ·x,   s = xᵀPx,   R = (ρ·max(θ·x, y))²        ρ: recent relative spread of such parts
    θ ← θ + Px·e / (s + R), projected on θ ≥ 0,   P ← P − Px·xᵀP / (s + R)

- *Forgetting is directional*: after the update P grows again, but only along Px, so that xᵀPx settles at R·(1/λ − 1).
  Plain forgetting inflates P everywhere: what calibration found out about small units would be lost within minutes of
  running large ones, and then never be tried again for its uncertainty.
- *Outliers*: |e| is clipped at 3·√(s+R), so a stall of the machine moves θ a little. Three in a row on the same side
  are no accident but a change of speed: they count in full, and the excited rows and
  columns of P grow, at most to their prior variance.
- *Prior*: the relative costs of rows and units measured on a CPU, with a standard deviation of their own size and
  one of twice that for the scale of each kind of part. The first observation sets the scale of all of them, the first
  one of a part on its own the scale of that kind.
- *Upper estimate*: √(xᵀPx) per part is what θ does not know; `margin` learns how far measurements scatter about the
  mean. Sums of upper estimates are upper estimates, so a planner may add units one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from statistics import median
from typing import Any

import numpy as np

from coserve.scheduler import features as at
from coserve.scheduler.features import Matrix, Vector
from coserve.scheduler.margin import Margins
from coserve.scheduler.plan_features import PlanFeatures
from coserve.scheduler.traits import Traits

_SMALLEST_SPREAD = 0.02
_FLOOR = 1e-6  # of the prior variance: less than that is rounding
# Of work that grows along one direction, x = fixed + s · slope: coefficients in s of its mean (2) and variance (3).
Line = tuple[float, float, float, float, float]
_BLOCKS = {
    "forward": slice(at.FORWARD, at.GRAPH),
    "graph": slice(at.GRAPH, at.OVERHEAD),
    "overhead": slice(at.OVERHEAD, at.HEAD),
    "head": slice(at.HEAD, at.BACKWARD),
    "backward": slice(at.BACKWARD, at.SLICE),
    "slice": slice(at.SLICE, at.SIZE),
}


class LatencyModel:
    def __init__(
        self, quantile: float, prompt_quantile: float, forgetting: float, traits: Traits | None = None
    ) -> None:
        """`traits`: None is a model of equal layers that runs without graphs."""
        self.traits = traits or Traits()
        self.margins = Margins(quantile, prompt_quantile)
        self._forgetting = 1.0 / forgetting - 1.0
        self._theta = _prior()
        self._covariance = _prior_covariance(self._theta)
        self._prior_variance = np.diagonal(self._covariance).copy()
        self._scaled: set[str] = set()
        self._spread: dict[str, float] = {}
        self._last_relative: dict[str, float] = {}
        self._run_of_outliers: dict[str, int] = {}
        self.observations = 0

    def part(self, x: Vector) -> tuple[float, float]:
        """(mean, deviation) seconds of one part."""
        variance = float(x @ self._covariance @ x)
        return float(x @ self._theta), sqrt(variance) if variance > 0.0 else 0.0

    def mean(self, x: Vector | int) -> float:
        """Mean seconds of one vector, or of an entry that is 1."""
        return float(self._theta[x] if isinstance(x, int) else x @ self._theta)

    def prices(self, first: int, last: int) -> list[float]:
        """Mean seconds of one of each entry from `first` to the one before `last`."""
        return self._theta[first:last].tolist()

    def means(self, x: Vector | Matrix) -> Vector:
        """Mean seconds of one vector, or of each of n."""
        return np.asarray(x @ self._theta)

    def lines(self, fixed: Matrix | int, slope: Matrix | int) -> list[Line]:
        """The lines of n kinds of work: one of the two is [n, SIZE], the other the one entry that is 1 for all."""
        many: Any
        many, entry = (fixed, slope) if isinstance(slope, int) else (slope, fixed)
        covered, n = many @ self._covariance, len(many)
        of_many = (many @ self._theta).tolist(), (covered * many).sum(1).tolist()
        of_one = [float(self._theta[entry])] * n, [float(self._covariance[entry, entry])] * n
        both = (2.0 * covered[:, entry]).tolist()
        (mean0, var0), (mean1, var2) = (of_many, of_one) if many is fixed else (of_one, of_many)
        return list(zip(mean0, mean1, var0, both, var2, strict=True))

    def predict(self, features: PlanFeatures) -> tuple[float, float]:
        """(mean, upper) seconds of a whole iteration."""
        estimates = self.parts(features)
        mean = sum(e[0] for e in estimates)
        return mean, self.margins.upper(features.kind, mean, sum(e[1] for e in estimates))

    def parts(self, features: PlanFeatures) -> list[tuple[float, float]]:
        """(mean, deviation) of every entry of `features.parts`; units that share a vector are asked once."""
        known: dict[int, tuple[float, float]] = {}
        estimates = []
        for x in features.parts:
            estimate = known.get(id(x))
            if estimate is None:
                estimate = known[id(x)] = self.part(x)
            estimates.append(estimate)
        return estimates

    def observe(self, features: PlanFeatures, seconds: float, parts: Mapping[int | str, float] | None = None) -> None:
        """Learn from one iteration.

        Args:
            seconds: of the whole iteration.
            parts: seconds of single parts where they were measured: "forward", and the index of a unit in the plan.

        Raises:
            ValueError: a duration is negative or not finite.
        """
        for value in (seconds, *(parts or {}).values()):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"a measured duration must be finite and not negative, got {value}")
        if seconds == 0.0:
            return
        if self.observations == 0:
            self._rescale(slice(0, at.SIZE), seconds / self.predict(features)[0])
        else:
            self.margins.observe(features.kind, *self.predict(features), seconds)
        self.observations += 1
        self._learn(features, seconds, dict(parts or {}))

    def _learn(self, features: PlanFeatures, seconds: float, parts: dict[int | str, float]) -> None:
        """Learn every part that was timed on its own; what is left, with the overhead, is one more observation."""
        rest = features.overhead.copy()
        left = seconds
        forward = parts.pop("forward", None)
        if features.forward is not None:
            if forward is None:
                rest += features.forward
            else:
                left -= forward
                self._update("graph" if features.forward[at.GRAPH] else "forward", features.forward, forward)
        # Units of one shape are one observation of their mean: a plan may hold hundreds of them.
        shapes: dict[int, tuple[Vector, list[float]]] = {}
        for index, x in enumerate(features.units):
            measured = parts.pop(index, None)
            if measured is None:
                rest += x
            else:
                left -= measured
                shapes.setdefault(id(x), (x, []))[1].append(measured)
        if parts:
            raise ValueError(f"seconds for parts that the plan does not have: {sorted(map(str, parts))}")
        for x, measured_all in shapes.values():
            kind = "head" if x[at.HEAD] else "backward" if x[at.BACKWARD] else "slice"
            self._update(kind, x, median(measured_all))
        rest_is_overhead = rest.sum() == features.overhead.sum()
        self._update("overhead" if rest_is_overhead else "iteration", rest, max(left, 0.0))

    def _rescale(self, block: slice, ratio: float) -> None:
        self._theta[block] *= ratio
        self._prior_variance[block] *= ratio * ratio
        self._covariance[block, :] *= ratio
        self._covariance[:, block] *= ratio

    def _update(self, kind: str, x: Vector, y: float) -> None:
        if kind in _BLOCKS and kind not in self._scaled and y > 0.0:
            self._scaled.add(kind)
            self._rescale(_BLOCKS[kind], y / max(float(x @ self._theta), 1e-9))
        covariance = self._covariance
        mean = float(x @ self._theta)
        gain = covariance @ x
        uncertainty = max(0.0, float(x @ gain))
        spread = self._spread.get(kind, 0.1)
        noise = (spread * max(mean, y)) ** 2 + 1e-14
        error = y - mean
        limit = 3.0 * sqrt(uncertainty + noise)
        excited = x != 0.0
        if abs(error) > limit:
            run = self._run_of_outliers.get(kind, 0)  # signed: how many in a row, and on which side
            run = max(run, 0) + 1 if error > 0.0 else min(run, 0) - 1
            self._run_of_outliers[kind] = run
            if abs(run) < 3:
                error = limit if error > 0.0 else -limit
            else:
                self._inflate(excited, 2.0)
                gain = covariance @ x
                uncertainty = max(0.0, float(x @ gain))
        else:
            self._run_of_outliers[kind] = 0
            # The spread is that of successive residuals: a lasting bias is an error to correct, not noise to accept.
            relative = error / max(mean, y, 1e-9)
            change = abs(relative - self._last_relative.get(kind, relative))
            self._last_relative[kind] = relative
            self._spread[kind] = max(_SMALLEST_SPREAD, 0.98 * spread + 0.02 * 0.886 * change)
        total = uncertainty + noise
        self._theta += gain * (error / total)
        # The update takes gain·gainᵀ/total away; forgetting gives back, in the same direction only, what keeps xᵀPx
        # from falling under noise·(1/λ − 1).
        forgotten = self._forgetting * noise / uncertainty if uncertainty > 0.0 else 0.0
        covariance += np.outer(gain, gain) * ((forgotten - 1.0) / total)
        self._project()

    def _project(self) -> None:
        """Bring θ back to θ ≥ 0 where P says it costs least: the other coefficients take over what a negative one
        explained. Cutting it off alone would leave every prediction that used it too high, for ever."""
        theta = self._theta
        i = int(np.argmin(theta))
        if theta[i] >= 0.0:
            return
        # Of the coefficients that are zero from here on nothing more is to learn: conditioning the covariance on them
        # ends this after at most one step each (projecting in turns went on for hundreds).
        conditioned = self._covariance.copy()
        while theta[i] < 0.0:
            row = conditioned[i].copy()
            if row[i] > 0.1 * _FLOOR * self._prior_variance[i]:
                theta -= row * (theta[i] / row[i])
                conditioned -= np.outer(row, row) / row[i]
            theta[i] = 0.0
            conditioned[i] = conditioned[:, i] = 0.0
            i = int(np.argmin(theta))

    def _inflate(self, excited: Vector, growth: float) -> None:
        """Scale the excited rows and columns of the covariance, none over its prior variance; and add a little to
        their diagonal, which keeps it positive definite against rounding. Scaling would also multiply any asymmetry."""
        covariance = self._covariance
        covariance += covariance.T.copy()
        covariance *= 0.5
        diagonal = covariance.reshape(-1)[:: at.SIZE + 1]
        diagonal += np.where(excited, _FLOOR * self._prior_variance, 0.0)
        scale = np.where(excited, growth, 1.0)
        scale = np.minimum(scale, np.sqrt(self._prior_variance / np.maximum(diagonal, _FLOOR * self._prior_variance)))
        covariance *= scale[:, None]
        covariance *= scale[None, :]


def _prior_covariance(theta: Vector) -> Vector:
    """A deviation of their own size for single coefficients, and twice that for all of one kind of part together."""
    covariance = np.diag((theta + 0.002) ** 2)
    for block in _BLOCKS.values():
        covariance[block, block] += np.outer(2.0 * theta[block], 2.0 * theta[block])
    return covariance


def _prior() -> Vector:
    """Relative costs before any measurement; one forward of a single row is about 0.1."""
    theta = np.zeros(at.SIZE)
    theta[at.FORWARD] = 0.08
    rows = (0.01, 0.01, 0.03, 0.06, 0.04, 0.03, 0.07, 0.25, 0.5, 1.0, 2.0)
    theta[at.ROWS : at.ROWS + len(rows)] = rows
    head = (0.02, 0.02, 0.03, 0.08, 0.25)
    theta[at.LOGITS : at.LOGITS + len(head)] = head
    theta[at.DECODE : at.DECODE + 2] = (0.002, 0.02)
    theta[at.PREFILL : at.PREFILL + 2] = (0.002, 0.05)
    theta[at.RIDE : at.RIDE + 3] = (0.01, 0.01, 0.05)
    theta[at.ADAPTERS : at.ADAPTERS + 3] = (0.01, 0.01, 0.005)
    graph = (0.06, 0.01, 0.02, 0.06, 0.2)
    theta[at.GRAPH : at.GRAPH + len(graph)] = graph
    theta[at.OVERHEAD] = 0.002
    theta[at.HEAD] = 0.001
    theta[at.HEAD + 1 : at.HEAD + 1 + len(head)] = (0.08, 0.04, 0.08, 0.2, 0.6)
    unit = (0.008, 0.002, 0.003, 0.005, 0.009, 0.017, 0.033, 0.066, 0.13)
    theta[at.BACKWARD : at.BACKWARD + len(unit)] = unit
    theta[at.BACKWARD + len(unit) : at.BACKWARD + len(unit) + 3] = (0.01, 0.002, 0.001)
    theta[at.SLICE] = 0.001
    sliced = (0.08, 0.05, 0.06, 0.04, 0.03, 0.07, 0.25, 0.5, 1.0)
    theta[at.SLICE + 1 : at.SLICE + 1 + len(sliced)] = sliced
    theta[at.SLICE + 1 + len(sliced) : at.SLICE + 3 + len(sliced)] = (0.05, 0.01)
    return theta
