"""LoRA terms of several adapters, added to the rows of one packed batch."""

from coserve.kernels.lora.reference import LoraSegment, lora_add

__all__ = ["LoraSegment", "lora_add"]
