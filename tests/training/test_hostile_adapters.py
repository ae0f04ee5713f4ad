"""Adapter folders that are broken or made to do harm: refused, with the field or tensor named, and quickly."""

from __future__ import annotations

import json
import os
import re
import struct
import time

import pytest
import torch
from training_jobs import BASE_DIGEST, SITES

from coserve.server.training.peft.folder import AdapterError, read_folder, write_folder
from coserve.server.training.peft.lora import LoraConfig, init_lora
from coserve.server.training.peft.patterns import Pattern, PatternError
from coserve.server.training.peft.sites import Site
from coserve.server.training.tensor_file import TensorFileError, read_tensors

pytestmark = pytest.mark.security

CONFIG = LoraConfig(r=3, alpha=6, target_modules=("q_proj", "down_proj"))
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    write_folder(path, CONFIG, init_lora(SITES, CONFIG, 1), "tiny", BASE_DIGEST)
    return path


def refused(folder, base_digest=BASE_DIGEST) -> AdapterError:
    start = time.monotonic()
    with pytest.raises(AdapterError) as caught:
        read_folder(folder, SITES, base_digest)
    assert time.monotonic() - start < 20
    assert len(caught.value.message) < 600
    return caught.value


def tensors_path(folder):
    return folder / "adapter_model.safetensors"


def rewrite_header(folder, change):
    """Replace the header by change(header), leaving the data."""
    content = tensors_path(folder).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    if not isinstance(text, bytes):
        text = json.dumps(header if text is None else text).encode()
    tensors_path(folder).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_untouched_folder_is_accepted(folder):
    config, weights = read_folder(folder, SITES, BASE_DIGEST)
    assert config.r == 3 and len(weights) == 4


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_tensors(folder, keep):
    content = tensors_path(folder).read_bytes()
    tensors_path(folder).write_bytes(content[:keep])
    refused(folder)


def test_any_single_cut_or_addition_is_noticed(folder):
    content = tensors_path(folder).read_bytes()
    tensors_path(folder).write_bytes(content + b"\0")
    assert "behind its last tensor" in refused(folder).message


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_000, 9 * 1024 * 1024])
def test_a_huge_header(folder, length):
    path = tensors_path(folder)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "header" in refused(folder).message


def test_a_sparse_file_with_a_huge_header(folder):
    with open(tensors_path(folder), "wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)
    assert "header" in refused(folder).message


def shift(header, by):
    start, stop = header[FIRST]["data_offsets"]
    header[FIRST]["data_offsets"] = [start + by, stop + by]


@pytest.mark.parametrize(
    "change, words, param",
    [
        (lambda h: shift(h, -4), "overlap|gap|whole|malformed", None),
        (lambda h: shift(h, 4), "overlap|gap", None),
        (lambda h: h[FIRST].update(data_offsets=[0, 2**62 - 1]), "bytes", FIRST),
        (lambda h: h[FIRST].update(data_offsets=[-8, 8]), "data_offsets", FIRST),
        (lambda h: h[FIRST].update(data_offsets=[144, 0]), "data_offsets", FIRST),
        (lambda h: h[FIRST].update(shape=[12, 3]), r"\[12, 3\].*\[3, 12\]", FIRST),
        (lambda h: h[FIRST].update(shape=[True, 36]), "shape", FIRST),
        (lambda h: h[FIRST].update(shape=[2**61, 2**61, 0]), "bytes", FIRST),
        (lambda h: h[FIRST].update(shape=["3", 12]), "shape", FIRST),
        (lambda h: h[FIRST].update(dtype="F8_E4M3"), "F8_E4M3.*: F64, F32, F16, BF16", FIRST),
        (lambda h: h[FIRST].update(dtype="I32"), "I32; weights are one of F64, F32, F16, BF16", FIRST),
        (lambda h: h[FIRST].update(extra=1), "exactly", FIRST),
        (lambda h: h.update({"evil": h.pop(FIRST)}), "not expected", "evil"),
        (lambda h: h.update({FIRST.replace("q_proj", "x_proj"): h.pop(FIRST)}), "not expected", None),
        (lambda h: h.update({"base_model.model.lm_head.lora_A.weight": h.pop(FIRST)}), "output head", None),
        (lambda h: h.update({FIRST + "_magnitude": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "", None),
        (lambda h: h.update(__metadata__={"a": 1}), "__metadata__", None),
        (lambda h: b"[" * 1_000_000, "nested|JSON", None),
        (lambda h: b"\xff\xfe{}", "JSON", None),
        (lambda h: b'{"a":{}, "a":{}}', "twice", None),
        (lambda h: b'{"a":' + b"9" * 10_000 + b"}", "", None),
        (lambda h: b"[]", "object", None),
    ],
)  # fmt: skip
def test_hostile_headers(folder, change, words, param):
    rewrite_header(folder, change)
    error = refused(folder)
    assert re.search(words, error.message), error.message
    if param:
        assert error.param == param


def test_tensors_that_share_all_bytes_of_a_file(tmp_path):
    path = tmp_path / "t.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for second, word in (([0, 16], "overlaps"), ([8, 16], "overlaps"), ([16, 32], None), ([20, 36], "gap")):
        start, stop = second
        other = {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": second}
        header = json.dumps({"a": entry, "b": other}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(stop))
        if word is None:
            assert set(read_tensors(path)) == {"a", "b"}
        else:
            with pytest.raises(TensorFileError, match=word):
                read_tensors(path)


def test_half_a_surrogate_pair_is_answered_in_plain_text(folder):
    rewrite_header(folder, lambda h: h.update({"\ud800": h.pop(FIRST)}))
    error = refused(folder)
    (error.message + error.param).encode()
    change_config(folder, target_modules=["\ud800", "q_proj"])
    assert refused(folder).param == "target_modules"


def test_two_tensors_on_the_same_bytes(folder):
    second = FIRST.replace("layers.0", "layers.1")
    rewrite_header(folder, lambda h: h[FIRST].update(data_offsets=h[second]["data_offsets"]))
    assert "overlaps" in refused(folder).message or "gap" in refused(folder).message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_tensor(folder, value):
    content = bytearray(tensors_path(folder).read_bytes())
    content[-4:] = struct.pack("<f", value)
    tensors_path(folder).write_bytes(content)
    error = refused(folder)
    assert error.param.endswith("lora_B.weight") and "NaN" in error.message


def test_a_missing_tensor_and_a_tensor_of_a_left_out_module(folder):
    change_config(folder, target_modules=["q_proj", "down_proj", "nothing"])
    read_folder(folder, SITES)
    change_config(folder, target_modules=["q_proj"])
    assert "down_proj" in refused(folder).param
    weights = init_lora(SITES, CONFIG, 1)
    weights.pop("model.layers.1.mlp.down_proj")
    tensors_path(folder).unlink()
    (folder / "adapter_config.json").unlink()
    write_folder(folder, CONFIG, weights, "tiny")
    error = refused(folder)
    assert "missing" in error.message and "layers.1.mlp.down_proj" in error.param


def test_an_adapter_of_another_base_model(folder):
    error = refused(folder, "c" * 64)
    assert "another base model" in error.message
    other = tuple(Site(site.name, site.layer, site.in_features + 4, site.out_features) for site in SITES)
    with pytest.raises(AdapterError, match="shape"):
        read_folder(folder, other)


def test_pickled_weights_are_never_opened(folder):
    canary = folder / "canary"
    pickled = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    (folder / "adapter_model.bin").write_bytes(pickled)
    tensors_path(folder).unlink()
    assert "pickled" in refused(folder).message
    tensors_path(folder).write_bytes(pickled)
    refused(folder)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_pipes_and_folders_in_place_of_files(folder, tmp_path, name):
    path = folder / name
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert refused(folder).param == name
    path.unlink()
    os.mkfifo(path)
    refused(folder)
    path.unlink()
    path.mkdir()
    refused(folder)


def test_a_link_in_place_of_the_folder(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    refused(link)
    refused(tmp_path / "nothing")


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True), ("lora_bias", True), ("megatron_config", {"x": 1}), ("megatron_core", "os"),
        ("trainable_token_indices", [1]), ("loftq_config", {"loftq_bits": 4}), ("eva_config", {}),
        ("corda_config", {"cache_file": "/etc/passwd"}), ("layer_replication", [[0, 1]]), ("use_qalora", True),
        ("target_parameters", ["experts.down"]), ("arrow_config", {"a": 1}), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "corda"), ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "transformers.x; import os"}),
        ("peft_type", "IA3"), ("task_type", "SEQ_CLS"), ("some_new_field", {"on": True}), ("auto_map", {"a": "b.C"}),
        ("r", 0), ("r", -1), ("r", 10**9), ("r", True), ("r", 2.0), ("r", "8"), ("lora_alpha", "x"),
        ("lora_alpha", 10**400), ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": 10**6}), ("rank_pattern", [1]),
        ("rank_pattern", {"": 2}), ("alpha_pattern", {"q_proj": None}), ("target_modules", None),
        ("target_modules", []), ("target_modules", ["lm_head", "q_proj"]), ("target_modules", ["model.embed_tokens"]),
        ("target_modules", [1]), ("target_modules", {"a": 1}), ("target_modules", ["nothing"]),
        ("target_modules", ["q"] * 5000), ("layers_to_transform", [-1]), ("layers_to_transform", "0"),
        ("layers_to_transform", [99]), ("layers_pattern", "(a+)+"), ("exclude_modules", 3),
    ],
)  # fmt: skip
def test_config_fields_that_are_unsupported_malformed_or_dangerous(folder, field, value):
    change_config(folder, **{field: value})
    error = refused(folder)
    assert error.param in (field, "target_modules"), error.message


@pytest.mark.parametrize("rank", [0, 1025])
def test_a_rank_outside_the_limits_is_told_them(folder, rank):
    change_config(folder, r=rank)
    assert f"r is {rank}; a rank is a whole number from 1 to 1024" in refused(folder).message
    change_config(folder, r=1024)
    assert "this base model and config need [1024, 12]" in refused(folder).message, "the limit itself is no problem"


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"[" * 500_000, b'{"r": NaN, "peft_type": "LORA"}', b"\xff", b" " * 2_000_000,
     b'{"peft_type": "LORA", "peft_type": "IA3"}', b'"\\ud800"'],
)  # fmt: skip
def test_malformed_config_files(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    refused(folder)


def test_fields_of_other_peft_versions_pass_while_they_are_off(folder):
    change_config(folder, future_switch=False, future_config=None, future_list=[], corda_config=None,
                  auto_mapping={"base_model_class": "LlamaForCausalLM",
                                "parent_library": "transformers.models.llama.modeling_llama"})  # fmt: skip
    read_folder(folder, SITES)


@pytest.mark.parametrize(
    "expression",
    ["(a*)*" * 60 + "b", "(.*)*" * 30 + "x", "((((.*)*)*)*)*x", "(.*a){1000}", "(((x{1000}){1000}){1000})",
     "(.|.|.)*" * 50 + "!", "(" * 2000 + ")" * 2000, "(?=(?=(?=.*)*)*)*x", "(a)\\1", "(?<=a)b", "(?i)q_proj", "a++",
     "(?>a)b", "(?P<n>a)(?(n)b|c)", "[", "x" * 5000, "(?:.*(?=.*)){200}z"],
)  # fmt: skip
def test_expressions_that_explode_or_are_unsupported(folder, expression):
    change_config(folder, target_modules=expression)
    assert refused(folder).param == "target_modules"


@pytest.mark.parametrize("key", ["(.*)*" * 30 + "x", "q)|(proj", "(", "(?i)q"])
def test_pattern_keys_that_explode_or_are_no_expression(folder, key):
    change_config(folder, rank_pattern={key: 3})
    start = time.monotonic()
    try:
        read_folder(folder, SITES)
    except AdapterError:
        pass
    assert time.monotonic() - start < 20


EXPRESSIONS = [
    r".*\.(q|v)_proj", r"model\.layers\.\d+\.mlp\.[a-z]+_proj", r"(?!.*mlp).*", r"^model.*q_proj$",
    r".*layers\.[02468]\..*",
    r"[^.]+\.layers\.(1[0-9]|\d)\..*?proj", r"(a|ab)(c|bcd)(d*)", r"a{2,3}b?", r"(?:a*)*", r"", r"\w+\.\w+", r"(a?){3}",
    r"(?=.*q).*p.*", r"x*?y+?", r"[\w.]*[^\d]", r"a|b|", r"(ab){2,}", r"\A.*\Z", r".*[\.-]q_.*", r"(|a)+b",
]  # fmt: skip
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.12.mlp.up_proj", "abcd", "aab", "aaa", "", "a", "b", "xxyy",
         "y", "ababab", "aaab", "model.q_proj", "lm_head", "a.b",
         "model.layers.3.mlp.gate_proj9", "ab\ncd"]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_matcher_answers_what_the_standard_library_answers(expression):
    pattern = Pattern(expression)
    for name in NAMES:
        assert pattern.matches(name) == (re.fullmatch(expression, name) is not None), name


def test_the_matcher_agrees_on_random_expressions():
    generator = torch.Generator().manual_seed(3)

    def draw(limit):
        return int(torch.randint(limit, (), generator=generator))

    def make(depth):
        kind = draw(7) if depth else 0
        if kind <= 1:
            return "ab.c"[draw(4)]
        if kind == 2:
            return f"(?:{make(depth - 1)}|{make(depth - 1)})"
        if kind == 3:
            return f"(?:{make(depth - 1)}){['*', '+', '?', '{2}', '{1,2}', '*?'][draw(6)]}"
        if kind == 4:
            return f"(?{'=!'[draw(2)]}{make(depth - 1)})"
        return make(depth - 1) + make(depth - 1)

    for _ in range(400):
        expression = make(4)
        pattern = Pattern(expression)
        for _ in range(6):
            name = "".join("abc."[draw(4)] for _ in range(draw(7)))
            assert pattern.matches(name) == (re.fullmatch(expression, name) is not None), (expression, name)


def test_unsupported_expressions_say_so():
    with pytest.raises(PatternError, match="look-behind"):
        Pattern("(?<!a)b")
