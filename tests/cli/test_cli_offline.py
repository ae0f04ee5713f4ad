"""The command line where no server is needed, or none is there: speed, usage errors, remedies."""

from __future__ import annotations

import http.server
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading

import click
import pytest
from click.testing import CliRunner

from coserve.server.cli import main
from coserve.server.cli.adapters import pack, unpack
from coserve.server.cli.finetune import job_request
from coserve.server.cli.follow import Progress, progress_of
from coserve.server.cli.output import duration, plain, show_table, size
from coserve.server.cli.remote import Remote, RemoteError

COMMANDS = ("serve", "demo", "chat", "finetune", "jobs", "models", "adapters", "keys")


def run(*arguments: str, **environment: str):
    return CliRunner().invoke(main, arguments, env={"COSERVE_BASE_URL": "http://127.0.0.1:9", **environment})


def test_help_answers_in_half_a_second_and_imports_nothing_heavy():
    code = (
        "import sys; from coserve.server.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch','transformers','pydantic','fastapi','httpx','rich'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # its own: others may have the cores
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds < 0.5, seconds
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_every_option_says_what_it_does_and_no_summary_is_cut():
    def walk(name, command):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"
        if isinstance(command, click.Group):
            for inner in command.list_commands(None):
                found = command.get_command(None, inner)
                if command is not main:  # which has summaries of its own
                    assert not found.get_short_help_str(limit=60).endswith("..."), f"{name} {inner}"
                walk(f"{name} {inner}", found)

    walk("coserve", main)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    done = run(name, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


def test_the_supervisor_and_the_command_line_never_import_the_model_libraries():
    code = (
        "import sys, pkgutil, importlib, coserve.server.cli as cli, coserve.server.supervisor\n"
        "for module in pkgutil.iter_modules(cli.__path__, 'coserve.server.cli.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "print(sorted({'torch','transformers','coserve.server.engine','coserve.server.training'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_serve_has_every_option_of_the_readme():
    text = run("serve", "--help").output
    for option in (
        "model", "host", "port", "data-dir", "dtype", "max-model-len", "kv-memory", "adapter-memory", "slo-ttft-ms",
        "slo-itl-ms", "train-window", "threads", "served-model-name",
    ):  # fmt: skip
        assert f"--{option}" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve"], "--model"),
        (["serve", "--model", "x", "--kv-memory", "lots"], "512MiB"),
        (["serve", "--model", "x", "--port", "70000"], "--port cannot be used: must be at most 65535"),
        (["serve", "--model", "x", "--threads", "0"], "--threads cannot be used: must be at least 1"),
        (["serve", "--model", ""], "--model cannot be used: must not be empty"),
        (["serve", "--model", "x", "--config", "/none.toml"], "/none.toml"),
        (["finetune", "/none.jsonl"], "/none.jsonl"),
        (["adapters", "download", "x", "--output", "/tmp"], "--output"),
        (["adapters", "delete", ".."], "no id or name"),
        (["jobs", "show", ""], "no id or name"),
        (["jobs", "show", "\udcff"], "UTF-8"),
        (["chat", "-m", "x", "--temperature", "nan", "hi"], "--temperature"),
        (["finetune", __file__, "--lr", "inf"], "--lr"),
        (["finetune", __file__, "--json", "--follow"], "--json"),
        (["serve", "--model", "x", "--slo-itl-ms", "nan"], "--slo-itl-ms"),
    ],
)
def test_usage_errors_exit_2_and_name_the_remedy(arguments, says):
    done = run(*arguments)
    assert done.exit_code == 2 and says in done.output


def test_serve_refuses_a_missing_model_with_3_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "coserve.server.cli", "serve", "--model", str(tmp_path / "none"),
         "--data-dir", str(tmp_path / "data")], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--model" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "arguments", [["models"], ["jobs", "list"], ["chat", "-m", "x", "hi"], ["keys", "list"], ["adapters", "list"]]
)
def test_no_server_is_one_line_with_the_remedy(arguments):
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.output.count("\n") == 1 and "coserve serve" in done.output and "COSERVE_BASE_URL" in done.output


def test_text_that_is_no_unicode_is_one_line():
    for done in (run("chat", "-m", "x", "caf\udce9"), pipe(b"caf\xe9", "chat", "-m", "x")):
        assert done.exit_code == 1 and done.output.count("\n") == 1 and "UTF-8" in done.output, done.output


def pipe(content: bytes, *arguments: str):
    return CliRunner().invoke(main, arguments, input=content, env={"COSERVE_BASE_URL": "http://127.0.0.1:9"})


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"COSERVE_API_KEY": "sk-cs-a\nsecret"}, "copy the key again"),
        ({"COSERVE_API_KEY": "sk-cs-secret\u00e9"}, "copy the key again"),
        ({"COSERVE_BASE_URL": "http://[::"}, "COSERVE_BASE_URL"),
        ({"COSERVE_BASE_URL": "nonsense"}, "COSERVE_BASE_URL"),
    ],
)
def test_variables_that_cannot_be_used_are_one_line_and_no_key_is_shown(variables, says):
    done = run("models", **variables)
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert says in done.output and "secret" not in done.output


@pytest.mark.parametrize("answer", ["[1]", '{"x": 1}', '{"data": [{"x": 1}]}', "null", "7"])
def test_json_of_another_kind_of_server_is_said_so(answer):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for arguments in (["models"], ["jobs", "list"], ["jobs", "show", "x"], ["chat", "hi"], ["keys", "list"]):
            done = run(*arguments, COSERVE_BASE_URL=f"http://127.0.0.1:{server.server_port}")
            assert done.exit_code == 1 and "is it a coserve server?" in done.output, done.output
            assert done.output.count("\n") == 1
        server.shutdown()


def test_a_server_that_is_something_else_is_said_so():
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status = 404 if "jobs" in self.path else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for arguments in (["models"], ["jobs", "list"]):
            done = run(*arguments, COSERVE_BASE_URL=url)
            assert done.exit_code == 1 and "is it a coserve server?" in done.output
        server.shutdown()


def test_where_the_server_is_comes_from_either_pair_of_variables():
    assert Remote({}).url == "http://127.0.0.1:8000"
    assert Remote({"OPENAI_BASE_URL": "http://h:1/v1/"}).url == "http://h:1"
    assert Remote({"OPENAI_BASE_URL": "http://h:1/v1", "COSERVE_BASE_URL": "http://c:2"}).url == "http://c:2"


def test_only_errors_that_pass_are_waited_out():
    assert RemoteError("x").passing and RemoteError("x", 503).passing and RemoteError("x", 429).passing
    assert not RemoteError("x", 404).passing and not RemoteError("x", 401).passing


def test_a_job_request_says_only_what_was_asked_for():
    assert job_request("base", {"rank": None, "targets": ()}) == {"model": "base"}
    asked = {
        "suffix": "s", "seed": 0, "epochs": 2, "batch_size": 4, "rank": 8, "learning_rate": 1e-3, "shuffle": False,
        "targets": ("q_proj",), "init": "adapter:a",
    }  # fmt: skip
    assert job_request("base", asked) == {
        "model": "base", "suffix": "s", "seed": 0,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        "adapter": {"r": 8, "init": "adapter:a", "target_modules": ["q_proj"]},
        "training": {"learning_rate": 1e-3, "shuffle": False},
    }  # fmt: skip


def test_progress_reads_a_job_at_every_stage():
    queued = progress_of({"status": "queued", "progress": {"queue_position": 2, "step": None}})
    assert queued.text == "queued (number 2)" and queued.total == 0
    running = Progress(5, 10, 0.51234, 812.4, 125.0, "running")
    assert running.text == "running  loss 0.5123  812 tokens/s  ETA 2m05s"
    slot = progress_of({"status": "queued", "progress": {"queue_position": 2, "reason": "waiting for a slot"}})
    assert slot.text == "queued (number 2, waiting for a slot)"
    assert progress_of({"status": "paused", "progress": {"reason": "storage_full"}}).text == "paused (storage_full)"


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 59.4, 125, 7500)] == ["0s", "59s", "2m05s", "2h05m"]
    assert [size(n) for n in (12, 2048, 3 * 1024**2, 5 * 1024**3)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert plain("a\x1b[31mb\u202e") == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}"


def test_a_row_is_one_line_whatever_stands_in_it(capsys):
    show_table(("id", "message"), [("a", "Line 1: bad.\nLine 2:\tworse."), ("b", None)], "nothing")
    assert capsys.readouterr().out == "a\tLine 1: bad. Line 2: worse.\nb\t\n"


def test_pack_takes_the_two_files_and_nothing_else(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "README.md"):
        (tmp_path / name).write_text(name)
    archive = io.BytesIO()
    pack(tmp_path, archive)
    with tarfile.open(fileobj=archive) as tar:
        assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
    unpack(io.BytesIO(archive.getvalue()), tmp_path / "new")
    assert (tmp_path / "new/adapter_config.json").read_text() == "adapter_config.json"
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json" in run("adapters", "upload", "x", str(tmp_path)).output


def test_pack_follows_links(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / f"blob-{name}").write_text(name)
        (tmp_path / name).symlink_to(tmp_path / f"blob-{name}")
    archive = io.BytesIO()
    pack(tmp_path, archive)
    with tarfile.open(fileobj=archive) as tar:
        assert all(member.isfile() for member in tar.getmembers())
        assert tar.extractfile("adapter_config.json").read() == b"adapter_config.json"


def test_unpack_stays_in_its_folder_whatever_the_archive_says(tmp_path):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        link = tarfile.TarInfo("evil")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        for name in ("../../out", "/abs", "evil/in"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    archive.seek(0)
    unpack(archive, tmp_path / "deep/new")
    assert sorted(os.listdir(tmp_path / "deep/new")) == ["abs", "in", "out"]
    assert os.listdir(tmp_path) == ["deep"] and not any(p.is_symlink() for p in (tmp_path / "deep/new").iterdir())


def test_json_output_is_only_json(tmp_path):
    """What a script reads must not be mixed with words for people."""

    class Api(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"object": "list", "data": [], "has_more": False}).encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for arguments in (["models"], ["jobs", "list"], ["adapters", "list"], ["keys", "list"]):
            assert json.loads(run(*arguments, "--json", COSERVE_BASE_URL=url).stdout) == []
            assert run(*arguments, COSERVE_BASE_URL=url).stdout == ""
        server.shutdown()
