"""Reads the tokenizer's files of a model folder, the way transformers reads them, without importing it.

The start and end tokens of a text are those of tokenizer.json: add_bos_token and add_eos_token beside it do not count.
The folder is the operator's, not a tenant's; still nothing in it is executed except the sandboxed chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The model folder's tokenizer cannot be used; the message says which file and what to do."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    backend: Backend
    specials: Mapping[str, str]  # "bos_token" -> "<s>", …: what a chat template sees
    chat_template: str | None
    model_stop_ids: frozenset[int]  # eos_token_id of generation_config.json and config.json


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Load a model folder's tokenizer. Raises TokenizerError."""
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
    specials = {
        name: text
        for name, value in config.items()
        if name.endswith("_token") and (text := _content(value)) is not None
    }
    backend = _read_backend(folder / "tokenizer.json")
    _add_missing_tokens(backend, config, specials)
    return TokenizerFiles(backend, specials, _read_template(folder, config), _stop_ids(folder))


def _read_backend(path: Path) -> Backend:
    if not path.is_file():
        raise TokenizerError(
            f"{path} is missing. The model needs a fast tokenizer: load its folder with transformers' AutoTokenizer "
            "once and save_pretrained it there."
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise TokenizerError(f"{path} cannot be read ({error}). Get the model's files again.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any], specials: Mapping[str, str]) -> None:
    """Make every declared special token one token: a tokenizer.json may lack some of them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared: dict[str, AddedToken] = {}
    decoder = config.get("added_tokens_decoder") or {}
    for _, value in sorted(decoder.items(), key=lambda item: int(item[0])):
        declared.setdefault(value["content"], _added_token(value))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra_texts = [_content(value) for value in (extra.values() if isinstance(extra, dict) else extra)]
    for text in [*specials.values(), *extra_texts]:
        if text is not None:
            declared.setdefault(text, AddedToken(text, special=True, normalized=False))
    for text, token in declared.items():
        if text in known:
            continue
        if token.special or text in specials.values():
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each {"name", "template"}
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template


def _stop_ids(folder: Path) -> frozenset[int]:
    found: set[int] = set()
    model = _read_json(folder / "config.json")
    text_model = model.get("text_config")
    for config in (_read_json(folder / "generation_config.json"), model, text_model):
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        ids = value if isinstance(value, list) else [value]
        found.update(one for one in ids if isinstance(one, int) and not isinstance(one, bool))
    return frozenset(found)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read ({error}). Get the model's files again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} does not hold a JSON object. Get the model's files again.")
    return value


def _content(value: object) -> str | None:
    """The text of a token that is written as a string or as an AddedToken's fields."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_token(value: Mapping[str, Any]) -> AddedToken:
    flags = {
        name: bool(value[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in value
    }
    return AddedToken(value["content"], **flags)
