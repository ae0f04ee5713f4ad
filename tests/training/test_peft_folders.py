"""Adapters on disk against stock PEFT: initial values, folders in both directions, which modules a config means."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from tiny_models import tiny_model

from coserve.server.training.peft.folder import read_folder, version_digest, write_folder
from coserve.server.training.peft.lora import LoraConfig, cast_weights, init_lora
from coserve.server.training.peft.sites import Site

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def sites_of(model):
    return tuple(
        Site(name, int(name.split(".")[2]), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    )


def with_adapter(model, config, seed=11, fill=True):
    """A fresh PEFT model over a copy of the base, its B matrices random so that they count."""
    import copy

    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    if fill:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return wrapped.eval()


def apply_by_hand(model, weights, input_ids):
    """The base's logits with every pair added by a hook, from the definition."""
    handles = []
    for name, pair in weights.items():

        def add(module, inputs, output, pair=pair):
            return output + pair.scaling * (inputs[0] @ pair.a.t()) @ pair.b

        handles.append(model.get_submodule(name).register_forward_hook(add))
    try:
        with torch.no_grad():
            return model(input_ids).logits
    finally:
        for handle in handles:
            handle.remove()


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "k_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 6, "q_proj": 5},
        "alpha_pattern": {r".*\.0\.mlp.down_proj": 32, r"k_pro[j-k]": 3},
        "use_rslora": True,
    },
    "regex": {"r": 2, "lora_alpha": 2, "target_modules": r"model\.layers\.(0|2)\..*\.(q|up)_proj"},
    "lookahead": {"r": 2, "lora_alpha": 2, "target_modules": r"(?!.*mlp).*_proj"},
    "layers": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layer and pattern": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "exclude": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    "gaussian": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_folders_saved_by_peft_mean_the_same_here(tmp_path, model, fields):
    oracle = with_adapter(model, peft.LoraConfig(**fields))
    oracle.save_pretrained(tmp_path)
    config, weights = read_folder(tmp_path, sites_of(model))
    saved = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, module in oracle.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert set(weights) == saved
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = oracle(input_ids).logits
    torch.testing.assert_close(apply_by_hand(model, weights, input_ids), want, rtol=1e-4, atol=1e-5)
    assert config.use_rslora == fields.get("use_rslora", False)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_folders_written_here_load_in_peft_and_keep_their_digest(tmp_path, model, fields):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    with_adapter(model, peft.LoraConfig(**fields)).save_pretrained(tmp_path / "theirs")
    config, weights = read_folder(tmp_path / "theirs", sites_of(model))
    write_folder(tmp_path / "ours", config, weights, "tiny")
    config_again, weights_again = read_folder(tmp_path / "ours", sites_of(model))
    assert config_again == config
    assert version_digest("base", config_again, weights_again) == version_digest("base", config, weights)
    import copy

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got = loaded(input_ids).logits
    torch.testing.assert_close(got, apply_by_hand(model, weights, input_ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("targets", ["all-linear", ("down_proj", "o_proj")])
def test_initial_values_are_those_of_peft_bit_for_bit(architecture, targets):
    model = tiny_model(architecture)
    listed = targets if isinstance(targets, str) else list(targets)
    oracle = with_adapter(model, peft.LoraConfig(r=5, lora_alpha=10, target_modules=listed, task_type="CAUSAL_LM"),
                          seed=2147483647, fill=False)  # fmt: skip
    config = LoraConfig(r=5, alpha=10, target_modules=targets)
    weights = init_lora(sites_of(model), config, 2147483647)
    theirs = {name: tensor for name, tensor in oracle.named_parameters() if "lora_" in name}
    assert len(theirs) == 2 * len(weights)
    for name, pair in weights.items():
        assert torch.equal(pair.a, theirs[f"base_model.model.{name}.lora_A.default.weight"])
        assert torch.equal(pair.b.t(), theirs[f"base_model.model.{name}.lora_B.default.weight"])
        assert pair.scaling == 2.0
    named = config.with_names(sites_of(model))
    assert named.sites(sites_of(model)) == config.sites(sites_of(model)) and not isinstance(named.target_modules, str)


def test_the_digest_depends_on_everything_and_on_nothing_else(model):
    sites = sites_of(model)
    config = LoraConfig(r=2, alpha=4, target_modules=("q_proj", "v_proj"))
    weights = init_lora(sites, config, 1)
    digest = version_digest("base", config, weights)
    reordered = dict(reversed(weights.items()))
    assert version_digest("base", LoraConfig(r=2, alpha=4.0, target_modules=("v_proj", "q_proj")), reordered) == digest
    others = {
        version_digest("other", config, weights),
        version_digest("base", LoraConfig(r=2, alpha=5, target_modules=("q_proj", "v_proj")), weights),
        version_digest("base", config, cast_weights(weights, "cpu", torch.float16)),
        version_digest("base", config, init_lora(sites, config, 2)),
    }
    assert len(others) == 4 and digest not in others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_width_keeps_its_bits(tmp_path, model, dtype):
    config = LoraConfig(r=3, alpha=4, target_modules=("q_proj",))
    weights = cast_weights(init_lora(sites_of(model), config, 1), "cpu", dtype)
    write_folder(tmp_path, config, weights, "tiny", "digest")
    _, again = read_folder(tmp_path, sites_of(model), "digest")
    assert all(torch.equal(again[name].a, weights[name].a) for name in weights)
    assert again["model.layers.0.self_attn.q_proj"].a.dtype == dtype


def test_weights_that_are_not_finite_are_never_written(tmp_path, model):
    config = LoraConfig(r=3, alpha=4, target_modules=("q_proj",))
    weights = init_lora(sites_of(model), config, 1)
    weights["model.layers.1.self_attn.q_proj"].b[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_B"):
        write_folder(tmp_path, config, weights, "tiny")


def test_the_folder_is_the_same_bytes_each_time(tmp_path, model):
    config = LoraConfig(r=3, alpha=4, target_modules=("q_proj",))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, config, init_lora(sites_of(model), config, 1), "tiny", "digest")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["peft_type"] == "LORA"
