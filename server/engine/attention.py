"""The attention function that transformers' modeling code calls, under the name "coserve".

It only unpacks the call: what the rows attend to is known by the pass that travels as `engine_ctx`. A keyword
that would change the scores and is not honoured here is refused, never dropped.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface

from coserve.kernels.attention.training import Score

ATTENTION_NAME = "coserve"

# Arguments that modeling code passes along and that do not change what attention computes.
_IGNORED = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_causal",
     "past_key_values", "cache_position", "position_embeddings", "layer_idx"}
)  # fmt: skip


class UnsupportedModel(ValueError):
    """The model cannot be served exactly; the message says why."""


class AttentionPass(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, Dv] of the pass's T rows -> [T, Hq, Dv]."""


def coserve_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, engine_ctx: AttentionPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, Dv], None)."""
    if engine_ctx is None:
        raise UnsupportedModel("its modeling code does not pass keyword arguments on to attention")
    if attention_mask is not None:
        raise UnsupportedModel("its modeling code builds attention masks of its own")
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _IGNORED]
    if unknown:
        raise UnsupportedModel(f"its attention takes arguments that are not supported: {', '.join(sorted(unknown))}")
    score = Score(query.shape[-1] ** -0.5 if scaling is None else float(scaling), sliding_window, softcap)
    out = engine_ctx.attend(int(module.layer_idx), query[0], key[0], value[0], score, s_aux)
    return out[None], None


def register() -> None:
    """Make `attn_implementation="coserve"` known to transformers. No mask function goes with it: masks are None."""
    AttentionInterface.register(ATTENTION_NAME, coserve_attention)
