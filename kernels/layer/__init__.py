"""What a decoder layer does beside products and attention: norms, rotary embedding, gated activations."""

from coserve.kernels.layer.dispatch import gated, rms_norm, rope

__all__ = ["gated", "rms_norm", "rope"]
