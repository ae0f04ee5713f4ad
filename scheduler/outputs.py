"""How long outputs get, learned from those that ended, and whether the K/V blocks will do for one stream more.

It may assume that `note` sees every plan that was carried out, and that every stream makes one token an iteration. It
never knows how long an output gets, only how long others got; and it only says who may join, never who runs.

*Lengths.* A histogram a tenant and class, in which an older output counts for less; until enough have ended there, that
of all. A stream that has come as far as x goes on as those did that reached x. Those under way count as far as they
have come, lest the short ones, which end first, pass for all. Part of an output more than were seen goes on for ever,
so nobody's end is certain before the most that its client allows.

*Peak.* At a moment t from now, a stream that is still there holds its blocks of today and those of t more tokens; one
that has ended holds none. The sum over all streams is uncertain, and is taken as its mean and some standard deviations.
At no moment up to the longest output known may that be more than there is. So admission looks ahead as in Gong et al.,
"Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025), who draw every stream's length from those of
the past; here nothing is drawn, and the same calls give the same plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coserve.scheduler.state import Plan, RequestState, SchedulerState

# Tokens at which a bin of lengths begins: every 8, and from 64 on every sixth more.
_EDGES = np.array([*range(0, 64, 8), *np.geomspace(64, 2**20, 64).astype(int)])
_MOMENTS = np.array([0, 8, 16, 24, *(2**n * m // 2 for n in range(5, 20) for m in (2, 3))])  # tokens from now
_LATER = _EDGES[:, None] + _MOMENTS  # how far a stream has come at each moment, by the bin in which it is now
_BIN = np.minimum(np.searchsorted(_EDGES, _LATER, "right") - 1, len(_EDGES) - 2)
_PART = np.minimum((_LATER - _EDGES[_BIN]) / (_EDGES[_BIN + 1] - _EDGES[_BIN]), 1.0)  # of the bin
_UNSEEN = 0.3  # outputs that are taken to go on for ever
_REMEMBERED = 1.0 - 1.0 / 256.0  # weight of an output that is left after the next one
_FORGOTTEN = 0.1  # weight at which one no longer counts as the longest
_MOST_KEYS = 1024  # tenants and classes with lengths of their own

Array = NDArray[np.float64]
Key = tuple[str, str]  # tenant, class


@dataclass
class Forecast:
    """Blocks that running streams will need beyond those they hold, by moment, and the `free` ones there are."""

    outputs: Outputs
    free: int
    size: int  # tokens a block
    mean: Array
    variance: Array

    def admit(self, request: RequestState, besides: int = 0) -> bool:
        """Whether there is room for one more, which from then on is one of them, and for as many blocks `besides`."""
        mean, variance = self.outputs.needs((request,), self.size)
        mean, variance = self.mean + mean, self.variance + variance
        if (mean + self.outputs.surprise * np.sqrt(variance) > self.free - besides).any():
            return False
        self.mean, self.variance, self.free = mean, variance, self.free - besides
        return True


class Outputs:
    def __init__(self, enough: int, surprise: float) -> None:
        """`enough`: outputs that must have ended before they say anything; `surprise`: standard deviations."""
        self.surprise = surprise
        self.longest = 0  # tokens that no output has come to, as far as that is remembered
        self._enough = enough
        self._slots: dict[Key, int] = {}  # who learned last is last
        self._known = [0] * (1 + _MOST_KEYS)  # outputs by slot; slot 0 is all
        self._counts = np.zeros((1 + _MOST_KEYS, len(_EDGES)))
        self._goes_on = np.empty(((1 + _MOST_KEYS) * len(_EDGES), len(_MOMENTS)))  # share, by slot and bin, by moment
        self._rows: set[str] = set()  # who had rows and was not seen to end
        self._last: list[RequestState] = []  # those, as they were; to free a whole state takes time

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return self._known[0] >= self._enough

    # ------------------------------------------------------------------ learning

    def note(self, plan: Plan, state: SchedulerState) -> None:
        """`plan` was carried out. Who had rows before and is gone from `state` has ended."""
        rows = {*plan.decodes, *(p.request_id for p in plan.prefills)}
        missing = self._rows - rows
        if missing:
            there = {r.request_id for r in state.requests if r.request_id in missing}
            ended = missing - there
            if ended:
                self._learn([r for r in self._last if r.request_id in ended], state)
            rows |= there
        self._rows, self._last = rows, [r for r in state.requests if r.request_id in rows]

    def _learn(self, ended: Iterable[RequestState], state: SchedulerState) -> None:
        changed: dict[Key, int] = {}
        for r in ended:
            key = r.tenant, r.slo_class
            changed[key] = self._slots[key] = slot = self._slots.pop(key, None) or self._new_slot()
            at = _bins([r.output_tokens + 1])[0]
            for i in (0, slot):
                self._known[i] += 1
                self._counts[i] *= _REMEMBERED
                self._counts[i, at] += 1.0
        under_way: dict[Key, list[int]] = {key: [] for key in changed}
        everywhere = [0]
        for r in state.requests:
            if r.output_tokens:
                everywhere.append(r.output_tokens)
                if (r.tenant, r.slo_class) in under_way:
                    under_way[r.tenant, r.slo_class].append(r.output_tokens)
        self._update(0, everywhere)
        for key, slot in changed.items():
            self._update(slot, under_way[key])
        longest = max(int(np.flatnonzero(self._counts[0] >= _FORGOTTEN)[-1]), int(_bins(everywhere).max()))
        self.longest = int(_EDGES[min(longest + 1, len(_EDGES) - 1)])

    def _update(self, slot: int, under_way: Sequence[int]) -> None:
        """Kaplan and Meier's estimate: whoever is still under way has at least not ended before."""
        counts = self._counts[slot]
        here = np.bincount(_bins(under_way), minlength=len(_EDGES))
        at_risk = _UNSEEN + counts[::-1].cumsum()[::-1] + here[::-1].cumsum()[::-1] - 0.5 * here
        reached = np.concatenate(([1.0], np.cumprod(1.0 - counts / at_risk)[:-1]))
        later = reached[_BIN] + _PART * (reached[_BIN + 1] - reached[_BIN])
        self._goes_on[slot * len(_EDGES) : (slot + 1) * len(_EDGES)] = later / reached[:, None]

    def _new_slot(self) -> int:
        if len(self._slots) < _MOST_KEYS:
            return 1 + len(self._slots)
        slot = self._slots.pop(next(iter(self._slots)))
        self._known[slot], self._counts[slot] = 0, 0.0
        return slot

    # ------------------------------------------------------------------ forecasts

    def forecast(self, running: Sequence[RequestState], free: int, size: int) -> Forecast:
        """`free`: blocks that nobody holds, as the requests say what they hold."""
        return Forecast(self, free, size, *self.needs(running, size))

    def needs(self, requests: Sequence[RequestState], size: int) -> tuple[Array, Array]:
        """(mean, variance) of the blocks that they need beyond those they hold, by moment."""
        moments = _MOMENTS[: int(np.searchsorted(_MOMENTS, self.longest)) + 1]
        made = np.array([r.output_tokens for r in requests], np.int64)
        most = np.array([r.most_output for r in requests], np.int64)
        total = -(np.array([r.total_tokens for r in requests], np.int64) // -size)  # in blocks
        shared = [r.blocks_shared for r in requests]
        row = np.array(self._slots_of(requests)) * len(_EDGES) + _bins(made)
        goes_on = self._goes_on.take(row, axis=0)[:, : len(moments)]
        goes_on *= moments < (most - made)[:, None]
        blocks = (total - shared if any(shared) else total)[:, None] - moments // -size
        expected = goes_on * blocks
        held = sum([r.blocks_held for r in requests]) - sum(shared)
        return expected.sum(axis=0) - held, np.einsum("ij,ij->j", expected, blocks - expected)

    def _slots_of(self, requests: Sequence[RequestState]) -> list[int]:
        known, slots, enough = self._known, self._slots, self._enough
        found = [slots.get((r.tenant, r.slo_class), 0) for r in requests]
        return [slot if known[slot] >= enough else 0 for slot in found]


def _bins(tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(_EDGES, np.asarray(tokens, np.int64), "right") - 1
