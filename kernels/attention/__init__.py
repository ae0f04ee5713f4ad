"""Attention: of inference rows over the paged K/V cache, and of training rows over contiguous keys and values."""

from coserve.kernels.attention.batch import PagedBatch, paged_batch
from coserve.kernels.attention.plan import AttentionPlan, Segment

__all__ = ["AttentionPlan", "PagedBatch", "Segment", "paged_batch"]
