"""Tiny random language models with a real tokenizer, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

BYTE_SPECIALS = ["<pad>", "<bos>", "<eos>"]
VOCABULARY = 512

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}

ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2,
                "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0,
               "attn_logit_softcapping": 20.0},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
}  # fmt: skip


# "llama:mini": for Triton's interpreter, which takes a millisecond for what a GPU does in none.
MINI = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
        "num_key_value_heads": 1}  # fmt: skip
MINI_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


def tiny_config(architecture: str, **overrides):
    """A transformers config of `architecture` at toy size, smaller still for "NAME:mini"."""
    from transformers import AutoConfig

    name, _, size = architecture.partition(":")
    values = {**SMALL, **ARCHITECTURES[name]}
    if size == "mini":
        values |= MINI | (MINI_LAYERS if "layer_types" in values else {})
    return AutoConfig.for_model(name, **{**values, **overrides})


def tiny_model(architecture: str, *, seed: int = 0, dtype=None, attention: str = "sdpa", **overrides):
    """A random causal LM in eval mode, whose weights are large enough that its outputs are not flat."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides), attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                # Gemma scales its embeddings up and uses them as head: small, or it only repeats its last token.
                embedding = 0.1 if architecture.startswith("gemma") else 0.5
                scale = embedding if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype or torch.float32).eval()


def byte_tokenizer():
    """A byte-level BPE tokenizer with 3 special tokens, 256 bytes and merges learned on a few lines."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 64,
        special_tokens=[AddedToken(token, special=True) for token in BYTE_SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [
        "The quick brown fox jumps over the lazy dog.",
        "Hello world, how are you today?",
        "User: hi\nAssistant: yes\n",
        "one two three four five six seven eight nine ten",
        "Zürich naïve 東京 😀 emoji 🎉",
    ]
    tokenizer.train_from_iterator(lines * 4, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def save_tiny_model(folder: Path, architecture: str = "llama", *, seed: int = 0, **overrides) -> Path:
    """Write a complete model folder (config, safetensors, tokenizer) and return it."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(architecture, seed=seed, **overrides).save_pretrained(folder, safe_serialization=True)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder
