"""What costs depend on beside a plan: a model's layers, the shapes of captured graphs, and the size of a usual adapter.

Pure arithmetic over integers that the engine reads off its model once. It knows no second.

Layers differ in how far they look back: one with a sliding window of w tokens attends to the last w only, so a row far
into a sequence costs it no more than row w does. What a pass through all layers costs is therefore counted as a mean
over them, and a backward unit, which lies in one layer, by that layer's window.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from coserve.scheduler.state import SweepState


@dataclass(frozen=True)
class Traits:
    windows: tuple[int | None, ...] = ()  # tokens that each layer attends to at most; empty: all layers to all
    graph_rows: tuple[int, ...] = ()  # rising: decode rows alone are filled up to one of these and replayed
    usual_pages: int = 1  # of an adapter of usual size
    kinds: tuple[tuple[int | None, float], ...] = field(init=False)  # (window, share of the layers that have it)

    def __post_init__(self) -> None:
        counts = Counter(self.windows or (None,))
        object.__setattr__(self, "kinds", tuple((w, n / counts.total()) for w, n in counts.items()))

    def window(self, layer: int) -> int | None:
        """Of a layer; None: it attends to all before it."""
        return self.windows[layer] if 0 <= layer < len(self.windows) else None

    def work(self, before: int, rows: int) -> float:
        """Query × key products of `rows` causal rows after `before` others, in a layer on average."""
        if not self.windows:
            return attention_work(before, rows)
        products = 0.0
        for window, share in self.kinds:
            products += share * attention_work(before, rows, window)
        return products

    def context(self, tokens: Sequence[int]) -> float:
        """Cached tokens that decode rows of sequences of so many tokens read, in a layer on average."""
        if not self.windows:
            return sum(tokens)
        read = 0.0
        for window, share in self.kinds:
            read += share * sum(tokens if window is None else [t if t < window else window for t in tokens])
        return read

    def replayed(self, rows: int) -> int:
        """The size of the graph that runs `rows` decode rows; 0: there is none for so many."""
        i = bisect_left(self.graph_rows, rows)
        return self.graph_rows[i] if rows and i < len(self.graph_rows) else 0

    def adapters(self, sweep: SweepState) -> tuple[float, float]:
        """In usual adapters: all of a sweep's, and what a row of it passes through on average."""
        jobs = sweep.jobs
        if len(jobs) == 1:
            size = jobs[0].adapter_pages / self.usual_pages
            return size, size
        rows = sum(job.rows or 1 for job in jobs)
        pages = sum(job.adapter_pages for job in jobs)
        passed = sum((job.rows or 1) * job.adapter_pages for job in jobs)
        return pages / self.usual_pages, passed / max(1, rows) / self.usual_pages


def attention_work(before: int, rows: int, window: int | None = None) -> int:
    """Query × key products of `rows` causal rows that come after `before` rows of the same stream, each of which
    attends to itself and the others of the last `window` (None: to all before it)."""
    if window is None or before + rows <= window:
        return rows * before + rows * (rows + 1) // 2
    growing = max(0, min(rows, window - before))  # rows that still see all before them
    return growing * before + growing * (growing + 1) // 2 + (rows - growing) * window
