"""LoRA terms of several adapters, added to the rows of one packed batch."""

from coserve.kernels.lora.families import LIMITS, Family, FamilyLimits, family_for
from coserve.kernels.lora.pages import PagedTerms, PageTable, SitePages
from coserve.kernels.lora.reference import LoraSegment
from coserve.kernels.lora.routing import Routing, RowRange, route

__all__ = [
    "LIMITS", "Family", "FamilyLimits", "LoraSegment", "PageTable", "PagedTerms", "Routing", "RowRange", "SitePages",
    "family_for", "route",
]  # fmt: skip
