"""A card of a machine that has run: a known card whose curves are scaled until they explain recorded iterations.

Records are those of `GET /v1/coserve/iterations` (or of a simulated ledger): tokens by kind, and measured seconds. They
say how much ran and not in which cuts, so shapes stay the known card's; what is fitted is one factor for passes, one
for the head and one for backward units. Neighbouring records are summed: a batch of label rows is counted when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coserve.scheduler.features import ForwardLoad
from coserve.scheduler.simulation.cards import Card, Curve

_TOGETHER = 16  # records that are summed
_WINDOW, _BATCH = 128, 64  # rows of a typical training unit, and of a batch of label rows


@dataclass(frozen=True, slots=True)
class Fit:
    card: Card
    factors: tuple[float, float, float]  # of passes, head, backward; 1 where nothing was recorded
    error: float  # median of |explained ÷ measured − 1| over sums of neighbouring records


def fit(card: Card, records: Sequence[Mapping[str, Any]]) -> Fit:
    """Scale `card` to `records`, each {"tokens": {kind: tokens}, "measured_s": seconds}.

    Raises:
        ValueError: there are too few records to say anything.
    """
    if len(records) < 2 * _TOGETHER:
        raise ValueError(f"{len(records)} iterations are too few to fit a card: at least {2 * _TOGETHER} are needed")
    groups = [records[i : i + _TOGETHER] for i in range(0, len(records) - _TOGETHER + 1, _TOGETHER)]
    costs = np.array([np.sum([_costs(card, r["tokens"]) for r in group], axis=0) for group in groups])
    measured = np.array([sum(float(r["measured_s"]) for r in group) for group in groups])
    left = np.maximum(measured - card.overhead * _TOGETHER, 1e-9)
    weighted = costs / left[:, None]  # errors count by their share of a group's time
    factors = np.ones(3)
    seen = weighted.sum(axis=0) > 0.0
    weights = np.ones(len(groups))
    for _ in range(20):  # groups that something else slowed count less and less
        factors[seen] = _nonnegative(weighted[:, seen] * weights[:, None], weights)
        residuals = np.abs(weighted @ factors - 1.0)
        scale = max(1.5 * float(np.median(residuals)), 1e-3)
        weights = np.minimum(1.0, scale / np.maximum(residuals, 1e-12))
    passes, head, backward = (float(f) for f in factors)
    fitted = replace(
        card,
        name=f"{card.name}, fitted",
        forward=_scaled(card.forward, passes), logits=_scaled(card.logits, passes),
        replay=None if card.replay is None else _scaled(card.replay, passes),
        ride=passes * card.ride, slice=passes * card.slice, adapter=passes * card.adapter,
        context=passes * card.context, head=_scaled(card.head, head), head_unit=head * card.head_unit,
        backward=_scaled(card.backward, backward),
    )  # fmt: skip
    return Fit(fitted, (passes, head, backward), float(np.median(np.abs(weighted @ factors - 1.0))))


def _costs(card: Card, tokens: Mapping[str, float]) -> tuple[float, float, float]:
    """Seconds of an iteration's passes, head and backward units on `card`, training in typical cuts."""
    decode, prefill = int(tokens.get("decode", 0)), int(tokens.get("prefill", 0))
    graph = 0 if prefill or tokens.get("train_forward") else card.replayed(decode)
    passes = card.forward_seconds(ForwardLoad(decode, 0, prefill, logit_rows=decode, graph_rows=graph))
    passes += float(tokens.get("train_forward", 0.0)) * card.slice_seconds(_WINDOW, card.layers) / _WINDOW
    head = float(tokens.get("head", 0.0)) * card.head_seconds(_BATCH, card.head_steps) / _BATCH
    backward = float(tokens.get("train_backward", 0.0)) * card.layers * card.backward(_WINDOW) / _WINDOW
    return passes, head, backward


def _nonnegative(a: Any, b: Any) -> Any:
    """The x >= 0 with the least |a·x − b|, by coordinate descent."""
    normal, target = a.T @ a, a.T @ b
    x = np.ones(len(target))
    for _ in range(200):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (target[i] - normal[i] @ x) / max(normal[i, i], 1e-12))
    return x


def _scaled(curve: Curve, factor: float) -> Curve:
    return Curve(tuple((rows, factor * seconds) for rows, seconds in curve.points), curve.tile)
