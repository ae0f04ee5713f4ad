"""The one function for attention of inference rows: Triton for a batch on a GPU, plain torch for all else."""

from __future__ import annotations

from torch import Tensor

from coserve.kernels.attention import reference
from coserve.kernels.attention.batch import PagedBatch
from coserve.kernels.attention.plan import AttentionPlan


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, sequences: AttentionPlan | PagedBatch, scale: float, *,
    sliding_window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query [T, Hq, D] over one layer's cache; see `coserve.kernels.attention.reference`."""
    if isinstance(sequences, PagedBatch):
        if query.is_cuda:
            # Here and not above: an installation without a GPU has no Triton.
            from coserve.kernels.attention import paged

            return paged.paged_attention(
                query, keys, values, sequences, scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
            )
        sequences = AttentionPlan(sequences.segments, sequences.block_size, query.dtype)
    return reference.paged_attention(
        query, keys, values, sequences, scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )
