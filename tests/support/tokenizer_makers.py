"""Real tokenizers of the families that models use, small enough to make on the spot. For tests only."""

from __future__ import annotations

import json
from pathlib import Path

from coserve.server.data.tokenizer import Tokenizer

LINES = ["The quick brown fox jumps over the lazy dog.", "Hello world, how are you today?", "naïve café in Zürich"] * 4


def byte_level(folder: Path) -> Tokenizer:
    """As Llama 3 and Qwen: byte-level BPE."""
    from tiny_models import byte_tokenizer

    return _saved(folder, byte_tokenizer())


def byte_fallback(folder: Path, *, strip: bool) -> Tokenizer:
    """As Gemma (strip=False) and Llama 2 (strip=True): spaces as ▁, unknown characters as byte tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if strip else decoding)
    specials = [AddedToken(text, special=True) for text in ("<pad>", "<bos>", "<eos>", "<unk>")]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([line.replace(" ", "▁") for line in LINES], trainer)
    state = json.loads(backend.to_str())
    size = len(state["model"]["vocab"])
    state["model"]["vocab"].update({f"<0x{byte:02X}>": size + byte for byte in range(256)})
    return _saved(folder, Tokenizer.from_str(json.dumps(state)))


def word_piece(folder: Path) -> Tokenizer:
    """A tokenizer whose text is not its tokens' bytes joined: spaces come from the decoder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")
    specials = [AddedToken(text, special=True) for text in ("<pad>", "<bos>", "<eos>", "<unk>")]
    backend.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False))  # fmt: skip  # noqa: E501
    return _saved(folder, backend)


def _saved(folder: Path, backend) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)
