"""What computes adapters and attention of a pass: plain torch, or the Triton kernels. Chosen once, when a model loads.

A pass describes its rows (`AdapterRows`, block tables, spans) and gets objects that are built once and used by
every layer. Nothing above this page asks what the device is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from coserve.kernels.attention.plan import Segment
from coserve.kernels.attention.training import Score
from coserve.kernels.lora import FamilyLimits
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.training.peft.sites import Site

if TYPE_CHECKING:
    from coserve.server.engine.linears import LinearGroup, RowsOfPass

log = logging.getLogger("coserve.engine")

BACKENDS = ("auto", "torch", "triton")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Dropout = Callable[[Tensor], Tensor]


class Adapter(Protocol):
    """An adapter as passes know it: one object a version, or a training copy."""

    def pair(self, site: Site) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, in], B [r, out], scaling), or None where the adapter has no term."""

    @property
    def pool(self) -> AdapterPool:
        """Whose pages hold it …"""

    @property
    def key(self) -> str:
        """… and its name there. Kernels read the pages; plain torch asks for pairs."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows [start, end) of a pass use this adapter."""

    start: int
    end: int
    adapter: Adapter
    dropout: Callable[[Site], Dropout] | None = None  # of the rows of x before A, in training
    take_gradient: Callable[[Site, Tensor, Tensor], None] | None = None  # called with (site, dA, dB); None: not wanted


class AdapterTerms(Protocol):
    """The adapters of one pass, at every site."""

    def linear(self, group: LinearGroup, x: Tensor, current: RowsOfPass) -> Sequence[Tensor]:
        """x [T, in] through a group of linear layers: the frozen product, offered to `current.keep` or taken from
        `current.stored`, and the adapters' terms. One [T, out] a site."""

    def leaves(self) -> list[Tensor]:
        """What gradients are wanted for, of the layers called so far."""

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        """Hand the gradients against `leaves()`, in their order, to whom they belong."""


class PagedRows(Protocol):
    """The sequences of a packed forward, over the paged K/V cache."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """q [T, Hq, D], one layer's cache [slots, Hkv, D or Dv] -> [T, Hq, Dv]"""


class SpanRows(Protocol):
    """Neighbouring rows of a training stream: the last rows of some sequence, then whole ones, maybe a last begun.

    Keys and values are those of the same rows and, before them, of the `prefix` rows that only the first span sees.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [Hq, T, D], k [Hkv, prefix + T, D], v [Hkv, prefix + T, Dv] -> out [Hq, T, Dv], log-sum-exp [Hq, T]"""

    def differentiable(
        self, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, score: Score,
        sinks: Tensor | None, stored: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """q [Hq, T, D], k, v of the T rows, `before` of the prefix -> [Hq, T, Dv], with gradients to all of them.
        With `stored` (out, log-sum-exp) the forward is not repeated."""


class Backend(Protocol):
    """Makes the objects of a pass."""

    name: str
    captures: bool  # whether its decode iterations may be captured in CUDA graphs
    largest_head: int | None  # values of an attention head; None: any
    families: FamilyLimits | None  # where its LoRA launches change; None: they never do

    def prepare(self, model: Any) -> None:
        """Called with a model of transformers before its layers are taken over."""

    def adapters(self, rows: Sequence[AdapterRows]) -> AdapterTerms:
        """rows: ascending and disjoint."""

    def paged_rows(self, segments: Sequence[Segment], block_size: int, dtype: torch.dtype, device: torch.device
                   ) -> PagedRows: ...  # fmt: skip

    def span_rows(self, prefix: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> SpanRows:
        """lengths: rows of each span, in their order."""


def choose_backend(name: str, dtype: torch.dtype, device: torch.device) -> Backend:
    """ "auto": the kernels on a CUDA device that has Triton, for dtypes that they know; plain torch everywhere else.

    Raises:
        ValueError: the kernels were asked for and cannot run here.
    """
    from coserve.server.engine.plain_backend import PlainBackend

    if name not in BACKENDS:
        raise ValueError(f"kernels {name!r} are unknown; choose one of {', '.join(BACKENDS)}")
    problem = _triton_problem(dtype, device)
    if name == "torch" or (name == "auto" and problem is not None):
        if device.type == "cuda" and problem is not None:
            log.warning("the kernels are not used: %s; plain torch is correct and slow", problem)
        return PlainBackend()
    if problem is not None:
        raise ValueError(f"the kernels cannot be used: {problem}")
    from coserve.server.engine.triton_backend import TritonBackend

    return TritonBackend()


def _triton_problem(dtype: torch.dtype, device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"they take {', '.join(str(d).removeprefix('torch.') for d in _TRITON_DTYPES)}, not {dtype}"
    if device.type != "cuda":
        return f"they need a CUDA device, not {device.type}"
    return None
