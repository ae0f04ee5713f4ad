"""LoRA terms of several adapters, added to the rows of one packed batch."""

from coserve.kernels.lora.pages import PagedTerms, PageTable, SitePages
from coserve.kernels.lora.reference import LoraSegment
from coserve.kernels.lora.routing import Routing, RowRange, route

__all__ = ["LoraSegment", "PageTable", "PagedTerms", "Routing", "RowRange", "SitePages", "route"]
