"""adapter_config.json: our own strict parser and writer of PEFT's LoRA config.

Every field is known and checked, or unknown and empty; nothing in a config is ever imported, followed or run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from coserve.server.training.peft.lora import MAX_RANK, LoraConfig
from coserve.server.training.tensor_file import parse_json

MAX_CONFIG_BYTES = 1024 * 1024
MAX_ENTRIES = 4096
MAX_NAME_CHARACTERS = 512

OUTPUT_AND_EMBEDDINGS = ("lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "wpe", "word_embeddings")

# Fields that would change what the adapter computes in a way that is not supported: (accepted values, reason).
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False, None), "DoRA is not supported"),
    "bias": (("none", None), "trained biases are not supported; train with bias='none'"),
    "modules_to_save": ((None, []), "fully trained modules are not supported"),
    "fan_in_fan_out": ((False, None), "transposed (Conv1D) base layers are not supported"),
    "lora_bias": ((False, None), "biases on B are not supported"),
    "megatron_config": ((None,), "Megatron layers are not supported"),
    "megatron_core": (("megatron.core", None), "Megatron layers are not supported"),
    "trainable_token_indices": ((None, [], {}), "trained token embeddings are not supported"),
    "loftq_config": ((None, {}), "LoftQ changes the base weights"),
    "eva_config": ((None,), "EVA initialisation is not supported"),
    "corda_config": ((None,), "CorDA changes the base weights"),
    "lora_ga_config": ((None,), "LoRA-GA changes the base weights"),
    "velora_config": ((None,), "VeLoRA is not supported"),
    "alora_invocation_tokens": ((None,), "activated LoRA is not supported"),
    "use_qalora": ((False, None), "QALoRA is not supported"),
    "monteclora_config": ((None,), "MonteCLoRA is not supported"),
    "layer_replication": ((None, []), "replicated layers are not supported"),
    "target_parameters": ((None, []), "parameters that are not linear layers (such as experts) are not supported"),
    "use_bdlora": ((None, False), "block-diagonal LoRA is not supported"),
    "arrow_config": ((None,), "Arrow routing is not supported"),
    "kasa_config": ((None,), "KaSA is not supported"),
    "ensure_weight_tying": ((False, None), "tied embedding adapters are not supported"),
}
# Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, …) mean another base model.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")
_IGNORED = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "qalora_group_size"}


class AdapterError(ValueError):
    """An adapter that cannot be used; `param` is the field, tensor or file at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(_printable(message))
        self.message = _printable(message)
        self.param = _printable(param)[:200]


def parse_config(text: bytes) -> LoraConfig:
    """The config in `text`. Raises AdapterError naming the field."""
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterError(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes", "adapter_config.json")
    try:
        fields = parse_json(text, "adapter_config.json")
    except ValueError as error:
        raise AdapterError(str(error), "adapter_config.json") from error
    if not isinstance(fields, dict):
        raise AdapterError("adapter_config.json must hold one object", "adapter_config.json")
    _refuse_unsupported(fields)
    rank_pattern = _pattern(fields, "rank_pattern", lambda key, value: _rank(key, value))
    return LoraConfig(
        r=_rank("r", fields.get("r", 8)),
        alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        target_modules=_targets(fields),
        dropout=_dropout(fields.get("lora_dropout", 0.0)),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern=rank_pattern,
        alpha_pattern=_pattern(fields, "alpha_pattern", lambda key, value: _number(key, value)),
        layers_to_transform=_layers(fields.get("layers_to_transform")),
        layers_pattern=_layers_pattern(fields.get("layers_pattern")),
        exclude_modules=_names(fields, "exclude_modules") or None,
    )


def canonical_config(config: LoraConfig) -> dict[str, Any]:
    """One form for all spellings of the same config: what digests are taken over."""
    return {
        "alpha": float(config.alpha),
        "alpha_pattern": [[key, float(value)] for key, value in config.alpha_pattern],
        "dropout": float(config.dropout),
        "exclude_modules": _listed(config.exclude_modules),
        "layers_pattern": sorted(config.layers_pattern) if config.layers_pattern else None,
        "layers_to_transform": sorted(config.layers_to_transform) if config.layers_to_transform else None,
        "r": config.r,
        "rank_pattern": [[key, value] for key, value in config.rank_pattern],
        "target_modules": _listed(config.target_modules),
        "use_rslora": config.use_rslora,
    }


def peft_config(config: LoraConfig, base_model_name: str) -> bytes:
    """The text of adapter_config.json, which stock PEFT reads."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _listed(config.target_modules),
        "exclude_modules": _listed(config.exclude_modules),
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in config.alpha_pattern},
        "layers_to_transform": sorted(config.layers_to_transform) if config.layers_to_transform else None,
        "layers_pattern": sorted(config.layers_pattern) if config.layers_pattern else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {_shown(fields.get('peft_type'))}; only LORA is supported", "peft_type")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"task_type is {_shown(fields['task_type'])}; only CAUSAL_LM is supported", "task_type")
    for name, value in fields.items():
        if name in _OFF:
            accepted, reason = _OFF[name]
            if not any(_same(value, choice) for choice in accepted):
                raise AdapterError(f"{name} is set in adapter_config.json: {reason}", name)
        elif name == "init_lora_weights":
            if not any(_same(value, choice) for choice in _HARMLESS_INITIALISATIONS):
                raise AdapterError(
                    f"init_lora_weights is {_shown(value)}: initialisations that change the base weights are not "
                    "supported; convert the adapter to a plain LoRA before saving it", name)  # fmt: skip
        elif name == "auto_mapping":
            _check_auto_mapping(value)
        elif name not in _KNOWN and name not in _IGNORED and value not in (None, False, "", [], {}):
            raise AdapterError(f"{name[:80]!r} is not a known field of adapter_config.json; remove it", name[:80])


def _check_auto_mapping(value: Any) -> None:
    """PEFT notes the model's class here and imports it on load; it is only looked at, never used."""
    if value is None:
        return
    well_formed = (
        isinstance(value, dict)
        and set(value) <= {"base_model_class", "parent_library", "unsloth_fixed"}
        and re.fullmatch(r"transformers(\.[A-Za-z0-9_]+)*", str(value.get("parent_library", "transformers")))
    )
    if not well_formed:
        raise AdapterError("auto_mapping names code outside transformers; remove the field", "auto_mapping")


def _targets(fields: Mapping[str, Any]) -> str | tuple[str, ...]:
    targets = _names(fields, "target_modules")
    if not targets:
        raise AdapterError("target_modules must name the modules that the adapter changes", "target_modules")
    if not isinstance(targets, str):
        for name in targets:
            if name.rsplit(".", 1)[-1] in OUTPUT_AND_EMBEDDINGS:
                raise AdapterError(f"target_modules contains {name!r}: adapters on embeddings and on the output head "
                                   "are not supported", "target_modules")  # fmt: skip
    return targets


def _names(fields: Mapping[str, Any], field: str) -> str | tuple[str, ...] | None:
    value = fields.get(field)
    if value is None:
        return None
    if isinstance(value, str):
        if not value.isprintable():
            raise AdapterError(f"{field} holds unprintable characters", field)
        return value
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise AdapterError(f"{field} must be a string or a list of at most {MAX_ENTRIES} names", field)
    if not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable() for name in value):
        raise AdapterError(f"{field} must hold module names of 1 to {MAX_NAME_CHARACTERS} printable characters", field)
    return tuple(sorted(set(value)))


def _pattern(fields: Mapping[str, Any], field: str, check: Callable[[str, Any], Any]) -> tuple[tuple[str, Any], ...]:
    value = fields.get(field)
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise AdapterError(f"{field} must map at most {MAX_ENTRIES} names to numbers", field)
    if not all(0 < len(key) <= MAX_NAME_CHARACTERS and key.isprintable() for key in value):
        raise AdapterError(f"{field} must have keys of 1 to {MAX_NAME_CHARACTERS} printable characters", field)
    return tuple((key, check(field, item)) for key, item in value.items())


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{field} is {_shown(value)}; a rank is a whole number from 1 to {MAX_RANK}", field)
    return value


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e6 or not math.isfinite(value):
        raise AdapterError(f"{field} is {_shown(value)}; it must be a number, at most a million", field)
    return float(value)


def _dropout(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise AdapterError(f"lora_dropout is {_shown(value)}; it must be at least 0 and under 1", "lora_dropout")
    return float(value)


def _flag(fields: Mapping[str, Any], field: str) -> bool:
    value = fields.get(field, False)
    if not isinstance(value, bool):
        raise AdapterError(f"{field} is {_shown(value)}; it must be true or false", field)
    return value


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    listed = [value] if type(value) is int else value
    if not isinstance(listed, list) or len(listed) > MAX_ENTRIES or not all(type(i) is int and i >= 0 for i in listed):
        raise AdapterError("layers_to_transform must be a layer number or a list of them", "layers_to_transform")
    return tuple(sorted(set(listed)))


def _layers_pattern(value: Any) -> tuple[str, ...] | None:
    if value is None or value in ("", []):
        return None
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > 64 or not all(
        isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) for name in listed
    ):  # fmt: skip
        raise AdapterError("layers_pattern must be the plain name of a list of layers, such as 'layers'",
                           "layers_pattern")  # fmt: skip
    return tuple(sorted(set(listed)))


def _listed(names: str | tuple[str, ...] | None) -> str | list[str] | None:
    return sorted(names) if isinstance(names, tuple) else names


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _printable(text: str) -> str:
    """Names come from the file: half a surrogate pair in one must not stop the answer from being encoded."""
    return text.encode("utf-8", "backslashreplace").decode()


def _same(value: Any, choice: Any) -> bool:
    return type(value) is type(choice) and value == choice


def _shown(value: Any) -> str:
    return repr(value)[:60]


_KNOWN = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules",
}  # fmt: skip
