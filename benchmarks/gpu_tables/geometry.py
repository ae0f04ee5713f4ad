"""Random models of a given shape, made on the device they run on, and what one token of them costs in bytes and FLOP.

Nothing is read from a disk or a network. Costs count what the mathematics needs, not what a program happens to do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from coserve.server.engine.attention import ATTENTION_NAME, register
from coserve.server.engine.backend import choose_backend
from coserve.server.engine.load import LoadedModel
from coserve.server.engine.model import BaseModel


@dataclass(frozen=True, slots=True)
class Geometry:
    """A Llama: the sizes of its parts."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    positions: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's linear modules."""
        kv = self.kv_heads * self.head_dim
        attention = ((self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv), (self.hidden, self.hidden))
        wide = (self.hidden, self.intermediate)
        return (*attention, wide, wide, (self.intermediate, self.hidden))

    @property
    def layer_parameters(self) -> int:
        """Of all layers' products together."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Of one adapter at every linear module."""
        return self.layers * rank * sum(i + o for i, o in self.linears)

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """What a decode step reads of the weights, whatever its batch: every product, the head's too."""
        return (self.layer_parameters + self.head_parameters) * dtype.itemsize

    def training_flop(self, length: int, rank: int, *, forwards: int = 1) -> float:
        """FLOP a token of a LoRA step on sequences of `length` tokens that all bear a loss.

        Frozen products: 2 a parameter forward (twice with `forwards=2`, but for the head) and 2 for the gradient of
        their input. Causal attention: two products forward, four backward, over (length + 1) / 2 keys on average.
        LoRA: 2 a parameter forward, 4 backward.
        """
        attention = self.layers * 4 * self.heads * self.head_dim * (length + 1) / 2
        return (
            2 * (forwards + 1) * self.layer_parameters
            + 4 * self.head_parameters
            + (forwards + 2) * attention
            + 2 * (forwards + 2) * self.lora_parameters(rank)
        )


LLAMA_8B = Geometry("Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256, 131072)
SMALL = Geometry("small", 4, 256, 8, 2, 512, 4096, 4096)
TOY = Geometry("toy", 2, 64, 4, 2, 128, 512, 4096)


def random_model(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, *, attention: str = "sdpa", spread: float = 0.02
) -> Any:
    """A transformers model in eval mode; the same arguments on the same device give the same weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=geometry.vocabulary, hidden_size=geometry.hidden, intermediate_size=geometry.intermediate,
        num_hidden_layers=geometry.layers, num_attention_heads=geometry.heads, num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim, max_position_embeddings=geometry.positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=spread,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def loaded_model(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, *, kernels: str = "auto", spread: float = 0.02
) -> LoadedModel:
    """The same weights as the engine takes them; `kernels` as in its settings."""
    register()
    model = random_model(geometry, dtype, device, attention=ATTENTION_NAME, spread=spread)
    base = BaseModel(model, backend=choose_backend(kernels, dtype, device))
    digest = hashlib.sha256(repr((geometry, str(dtype), spread)).encode()).hexdigest()
    return LoadedModel(base, digest, "llama", geometry.positions)
