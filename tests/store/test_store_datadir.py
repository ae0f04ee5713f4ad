"""The data directory: one server at a time, one base model, and no way out of it."""

import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve.server.store import ids
from coserve.server.store.atomic import atomic_file, publish_folder, write_atomic
from coserve.server.store.datadir import (
    BaseModelChanged,
    DataDirectory,
    DataDirectoryError,
    DataDirectoryLocked,
    UnsafePath,
)


@pytest.fixture
def directory(tmp_path):
    made = DataDirectory(tmp_path / "data")
    made.prepare()
    return made


def test_a_second_server_is_told_who_has_the_lock(tmp_path):
    hold = "import sys; from pathlib import Path; from coserve.server.store.datadir import DataDirectory; " \
           "DataDirectory(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"  # fmt: skip
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    second = DataDirectory(tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataDirectoryLocked, match=f"process {holder.pid}.*--data-dir"):
            second.lock()
    finally:
        holder.kill()
        holder.communicate()
    second.lock()
    second.unlock()


def test_a_child_that_inherits_the_descriptor_keeps_the_lock(tmp_path):
    first, second = DataDirectory(tmp_path), DataDirectory(tmp_path)
    descriptor = first.lock()
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[descriptor]
    )
    try:
        first.unlock()
        with pytest.raises(DataDirectoryLocked):
            second.lock()
    finally:
        child.communicate()
    second.lock()
    second.unlock()


def test_preparing_twice_keeps_all_but_tmp(directory):
    directory.bind_base("d" * 64)
    file = directory.file("default", "file-1")
    file.parent.mkdir()
    file.write_bytes(b"x")
    (directory.tmp / "left").write_bytes(b"x")
    (directory.tmp / "folder").mkdir()
    (directory.tmp / "folder" / "inside").write_bytes(b"x")
    outside = directory.root.parent / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(b"x")
    (directory.tmp / "link").symlink_to(outside)
    DataDirectory(directory.root).prepare()
    assert file.read_bytes() == b"x" and list(directory.tmp.iterdir()) == []
    assert (outside / "keep").exists()
    assert directory.base_digest() == "d" * 64


def test_a_first_start_that_was_cut_short_goes_on(tmp_path):
    root = tmp_path / "data"
    for name in ("models", "files", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "lock").touch()
    DataDirectory(root).prepare()
    assert (root / "jobs").is_dir()


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(DataDirectoryError, match=r"thesis\.doc"):
        DataDirectory(tmp_path).prepare()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["thesis.doc"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layout_version": 2, "base_digest": null}'])
def test_a_layout_file_of_another_release_or_damaged(directory, text):
    (directory.root / "layout.json").write_text(text)
    with pytest.raises(DataDirectoryError, match="--data-dir"):
        directory.prepare()


def test_the_base_model_may_not_change(directory):
    assert directory.base_digest() is None
    directory.bind_base("a" * 64)
    directory.bind_base("a" * 64)
    with pytest.raises(BaseModelChanged, match=r"a{12}, this one is b{12}.*--data-dir"):
        DataDirectory(directory.root).bind_base("b" * 64)


def test_a_data_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for use in (DataDirectory.prepare, DataDirectory.lock):
        with pytest.raises(DataDirectoryError, match="writable"):
            use(DataDirectory(tmp_path / "file" / "data"))


def test_a_path_of_150_characters(tmp_path):
    root = tmp_path / ("d" * 75) / ("e" * (150 - 77 - len(str(tmp_path))) if len(str(tmp_path)) < 70 else "e" * 75)
    made = DataDirectory(root)
    made.lock()
    made.prepare()
    assert len(str(root)) >= 150
    path = made.adapter_version("tenant-" + "x" * 22, ids.new_id(ids.ADAPTER), "f" * 64)
    path.mkdir(parents=True)
    assert made.resolve(made.relative(path)) == path
    made.unlock()


@pytest.mark.security
@pytest.mark.parametrize(
    "part",
    ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0b", ".hidden", "a b", "a\n", "%2e%2e", "é", "-x", "a" * 202],
)
def test_parts_that_are_no_plain_names(directory, part):
    for path in (lambda: directory.join(part), lambda: directory.file("default", part), lambda: directory.job(part)):
        with pytest.raises(UnsafePath):
            path()


@pytest.mark.security
@settings(
    max_examples=300, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.lists(st.text(max_size=12) | st.sampled_from(["..", ".", "/", "a", "tmp"]), max_size=4))
def test_no_text_leads_out(directory, parts):
    try:
        path = directory.join(*parts)
    except UnsafePath:
        return
    assert path.resolve().is_relative_to(directory.root.resolve())
    assert len(path.relative_to(directory.root).parts) == len(parts)


@pytest.mark.security
def test_links_are_refused(directory):
    (directory.root / "adapters" / "default").symlink_to("/etc")
    with pytest.raises(UnsafePath, match="link"):
        directory.adapter("default", "passwd")
    with pytest.raises(UnsafePath):
        directory.relative(directory.root.parent / "other")
    for stored in ("../x", "adapters/../../x", "/etc/passwd", "adapters//x", ""):
        with pytest.raises(UnsafePath):
            directory.resolve(stored)


def test_an_atomic_write_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, b"one")
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["x"]
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o600


def test_a_folder_is_published_once(tmp_path):
    for name in ("t1", "t2"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_bytes(name.encode())
    publish_folder(tmp_path / "t1", tmp_path / "done")
    with pytest.raises(FileExistsError):
        publish_folder(tmp_path / "t2", tmp_path / "done")
    assert (tmp_path / "done" / "sub" / "f").read_bytes() == b"t1"


def test_ids_are_long_random_and_plain(directory):
    made = {ids.new_id(ids.FILE) for _ in range(1000)}
    assert len(made) == 1000
    for id_ in made:
        assert len(id_) == len("file-") + 22 and id_[5:].isalnum() and id_.isascii()
    assert len(ids.ALPHABET) ** 22 > 2**128
    assert {character for id_ in made for character in id_[5:]} == set(ids.ALPHABET)
    directory.file("default", made.pop())
