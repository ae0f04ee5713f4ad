"""Checks before a start: each refusal has its exit code and says what to do."""

from __future__ import annotations

import os
import stat

import pytest

from coserve.server.processes.preflight import (
    CannotStart,
    make_run_directory,
    open_listener,
    reachable_url,
    resolve_model,
    socket_path,
    take_data_directory,
)


def test_a_model_folder_becomes_absolute_and_a_hub_id_stays(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "m/model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m") == str(tmp_path / "m")
    assert resolve_model("google/gemma-3-270m") == "google/gemma-3-270m"
    assert resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize(
    "model", ["./none", "/none/at/all", "~/no-such-folder", "a/b/c", "empty", "weightless", "broken", "file.bin"]
)
def test_a_path_without_a_model_is_refused_at_once(tmp_path, monkeypatch, model):
    for name in ("empty", "weightless", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "weightless/config.json").write_text("{}")
    (tmp_path / "weightless/pytorch_model.bin").touch()
    (tmp_path / "broken/config.json").write_text("[")
    (tmp_path / "file.bin").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotStart, match=r"--model|give |copy the model again") as caught:
        resolve_model(model)
    assert caught.value.code == 3


def test_an_unusable_host_is_a_usage_error():
    for host in ("256.1.1.1", "203.0.113.7"):
        with pytest.raises(CannotStart, match="--host") as caught:
            open_listener(host, 0)
        assert caught.value.code == 2


def test_a_listener_on_all_addresses_is_reached_on_the_loopback():
    with open_listener("0.0.0.0", 0) as listener:
        assert reachable_url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_folder_that_is_no_data_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CannotStart, match="--data-dir") as caught:
        take_data_directory(tmp_path)
    assert caught.value.code == 4
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_the_run_directory_is_private_and_short(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    run = make_run_directory(tmp_path / "run")
    try:
        assert len(socket_path(run)) < 107 and stat.S_IMODE(run.stat().st_mode) == 0o700
        assert not list(long.iterdir())
    finally:
        os.rmdir(run)


def test_the_note_of_an_earlier_run_removes_only_folders_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    precious = tmp_path / "photos"
    precious.mkdir()
    (tmp_path / "run").write_text(str(precious))
    run = make_run_directory(tmp_path / "run")
    assert precious.is_dir()
    again = make_run_directory(tmp_path / "run")
    assert not run.exists()
    os.rmdir(again)
