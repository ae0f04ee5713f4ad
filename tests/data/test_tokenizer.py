"""The tokenizer against transformers' on the same folder; ids that end an answer; bytes of tokens."""

import json
import subprocess
import sys

import pytest
from chat_templates import FAMILIES, save_chat_tokenizer
from tiny_models import byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coserve.server.data.tokenizer import Tokenizer
from coserve.server.data.tokenizer_files import TokenizerError

TEXTS = [
    "", " ", "a", "Hello world", "  two  spaces ", "line\nbreaks\r\n\n", "Zürich naïve 東京 😀 🎉👩‍👩‍👧",
    "<bos>x<eos> <eos>",
    "<|im_start|>a",
    "User: hi\nAssistant: yes", "\ue000\u200b\ufeff", "1234567890", "x" * 5000, "\x01\x7f",
]  # fmt: skip


def sentencepiece_like():
    """BPE with ▁ for spaces, a dummy prefix and byte tokens, as in the llama and gemma families."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{value:02X}>" for value in range(256)] + list("▁abcdehlorwyst.!?\n")
    pieces += ["▁h", "▁he", "ll", "▁hell", "▁hello", "▁w", "or", "▁wor", "▁world"]
    merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o"), ("▁", "w"), ("o", "r"), ("▁w", "or")]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(**options):
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<bos>", eos_token="<eos>", **options)


def saved(folder, tokenizer, **config):
    """Save, with `config` written over tokenizer_config.json; both tokenizers of the folder."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


KINDS = {
    "byte level": (byte_level, {}),
    "sentencepiece": (sentencepiece_like, {}),
    "without bos": (byte_level, {"add_bos_token": False}),
    "bos and eos": (byte_level, {"add_bos_token": True, "add_eos_token": True}),
    "new specials": (byte_level, {"extra_special_tokens": ["<new>", "World"], "image_token": "<img>"}),
    "added tokens": (byte_level, {"added_tokens_decoder": {"400": {"content": "quick", "lstrip": True}}}),
    "another eos": (byte_level, {"eos_token": "dog."}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS])
def test_ids_and_texts_are_those_of_transformers(tmp_path, kind):
    make, config = KINDS[kind]
    ours, theirs = saved(tmp_path, make(), **config)
    texts = [*TEXTS, "a <new> World <img>", "the quick brown dog.", "hello world"]
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids, (text, special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        encoded = ours.encode_with_spans(text)
        expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded.ids == expected["input_ids"]
        assert [tuple(span) for span in expected["offset_mapping"]] == encoded.spans
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert {**theirs.special_tokens_map}.items() <= ours.specials.items()
    for id_ in range(0, ours.vocab_size, 7):
        assert ours.id_to_token(id_) == theirs.convert_ids_to_tokens(id_)


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    ours, theirs = saved(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    for text in ("a", "one two three four five six"):
        assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_token_bytes_join_to_the_text(tmp_path, kind):
    ours, _ = saved(tmp_path, KINDS[kind][0]())
    for text in ("hello world", "Zürich 東京 😀 <eos>", "tab\tline\n\x01"):
        ids = ours.encode(text, add_special_tokens=False)
        joined = b"".join(ours.token_bytes(id_) for id_ in ids)
        assert joined.decode() == (" " if kind == "sentencepiece" else "") + text
    for outside in (-1, ours.vocab_size, 2**31, 2**40):
        assert ours.token_bytes(outside) == b"" and ours.id_to_token(outside) is None
    assert ours.decode([ours.vocab_size + 5, -3, 2**40]) == ""


def test_a_continuation_gets_no_dummy_prefix(tmp_path):
    ours, _ = saved(tmp_path, sentencepiece_like())
    assert ours.decode(ours.encode("hello", add_special_tokens=False)) == "hello"
    assert ours.id_to_token(ours.encode_continuation("hello")[0]) != "▁hello"
    assert [ours.id_to_token(id_) for id_ in ours.encode_continuation(" hello")] == ["▁hello"]


def test_stop_ids_are_the_union(tmp_path):
    save_chat_tokenizer(tmp_path, FAMILIES["chatml"])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.1}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9, "text_config": {"eos_token_id": 10}}')
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.stop_ids == {7, 8, 9, 10, ours.eos_id, ours.token_to_id("<|im_end|>")}
    assert "<|im_end|>" in ours.stop_texts


@pytest.mark.parametrize("family", [*FAMILIES])
def test_the_turn_end_of_each_family(tmp_path, family):
    save_chat_tokenizer(tmp_path, FAMILIES[family])
    ours = Tokenizer.from_folder(tmp_path)
    turn_end = "<eos>" if family == "instruct" else "<|im_end|>"
    assert ours.stop_ids == {ours.eos_id, ours.token_to_id(turn_end)}


def test_a_turn_that_ends_in_plain_text_has_no_stop_id(tmp_path):
    save_chat_tokenizer(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }} End. {% endfor %}")
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.stop_ids == {ours.eos_id}


def test_the_default_template(tmp_path):
    save_chat_tokenizer(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So?"},
    ]
    assert not ours.has_own_template
    assert ours.template.render(chat, add_generation_prompt=True) == (
        "<bos>System: Be brief.\nUser: Hi you\nAssistant: Yes<eos>\nUser: So?\nAssistant:"
    )
    assert ours.stop_ids == {ours.eos_id}
    assert ours.encode(ours.template.render(chat), add_special_tokens=False).count(ours.bos_id) == 1


def test_templates_from_each_place(tmp_path):
    tokenizer = save_chat_tokenizer(tmp_path, FAMILIES["chatml"])
    assert (tmp_path / "chat_template.jinja").exists()
    source = Tokenizer.from_folder(tmp_path).template.source
    assert source == tokenizer.chat_template
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for value in ("inline", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "inline"}]):
        path.write_text(json.dumps({**config, "chat_template": value}))
        assert Tokenizer.from_folder(tmp_path).template.source == "inline"
        assert AutoTokenizer.from_pretrained(tmp_path).get_chat_template() == "inline"


def test_folders_that_cannot_be_used_say_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match="save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    byte_level().save_pretrained(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.security
def test_code_named_in_the_folder_does_not_run(tmp_path):
    canary = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    byte_level().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    path.write_text(json.dumps(config))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("a") and not canary.exists()


def test_lone_surrogates_are_refused(tmp_path):
    ours, _ = saved(tmp_path, byte_level())
    for call in (ours.encode, ours.encode_with_spans, ours.encode_continuation):
        with pytest.raises(ValueError, match="surrogate"):
            call("ab\ud800")


def test_the_data_package_needs_no_torch():
    code = (
        "import sys, coserve.server.data.dataset, coserve.server.tenancy.issuing, coserve.server.store.datadir; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
