"""Turns one GGUF file into a folder of float32 safetensors with its tokenizer; runs as a process of its own.

Standard output carries one JSON line a stage, `{"stage": …, "done": share}`; everything else goes to standard
error. The stages' shares are those of a run on two cores, where reading the vocabulary takes most of the time.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

# (stage, seconds it took on two cores): sets the bar's pace, nothing depends on it
STAGES = (
    ("loading the libraries", 3.0),
    ("reading the quantised model", 31.0),
    ("writing float32 safetensors", 2.0),
    ("reading the tokenizer", 13.0),
    ("checking what was written", 2.0),
)


class Stages:
    """Runs the stages in order, reporting once a second where within the whole the conversion is."""

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report = report
        self._total = sum(seconds for _, seconds in STAGES)
        self._index = 0

    def run(self, work: Callable[[], Result]) -> Result:
        """Do the next stage's work."""
        name, expected = STAGES[self._index]
        before = sum(seconds for _, seconds in STAGES[: self._index])
        self._index += 1
        started, ended = time.monotonic(), threading.Event()

        def tick() -> None:
            while not ended.wait(1.0):
                inside = min(time.monotonic() - started, 0.98 * expected)
                self._report(name, (before + inside) / self._total)

        self._report(name, before / self._total)
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            return work()
        finally:
            ended.set()
            ticker.join()


def report(stage: str, done: float) -> None:
    print(json.dumps({"stage": stage, "done": round(done, 4)}), flush=True)


def convert(gguf: Path, folder: Path) -> None:
    """Write `folder`: config, generation config, safetensors, tokenizer. Raises ValueError if it does not read back."""
    stages = Stages(report)
    torch, transformers = stages.run(_libraries)
    model = stages.run(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,  # every 4- to 8-bit value is exact in it
        )
    )
    model.config._name_or_path = folder.name  # the folder's origin is in its marker, not a path of this machine
    stages.run(lambda: model.save_pretrained(folder, max_shard_size="4GB"))
    tokenizer = stages.run(lambda: transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    tokenizer.save_pretrained(folder)
    stages.run(lambda: check(folder, model.config.vocab_size))
    for path in folder.iterdir():
        path.chmod(0o644)


def _libraries():  # type: ignore[no-untyped-def]
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def check(folder: Path, vocabulary: int) -> None:
    """Read the folder back the way the server will. Raises ValueError naming what is wrong."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, the model {vocabulary}")
    text = "Hello, world!  Zoë ate 3 \N{CROISSANT}s.\n"
    tokens = tokenizer.encode(text)
    if tokens.tokens[0] != "<bos>" or tokenizer.decode(tokens.ids) != text:
        raise ValueError(f"the tokenizer turns {text!r} into {tokenizer.decode(tokens.ids)!r}")
    with safe_open(str(folder / "model.safetensors"), framework="np") as tensors:
        shape = tensors.get_slice("model.embed_tokens.weight").get_shape()
    if shape[0] != vocabulary:
        raise ValueError(f"the embedding has {shape[0]} rows, the vocabulary {vocabulary}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
