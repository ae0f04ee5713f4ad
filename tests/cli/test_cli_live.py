"""The command line against a whole server: what is printed, to which stream, with which exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from live_server import COSERVE, LiveServer
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny_model(folder / "tiny")
    with LiveServer(model, folder / "data", served_model_name="tiny-base") as server:
        yield server


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    lines = [{"prompt": f"{a} {b}:", "completion": f" {b} {a}"} for a in words for b in words[:2]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(server, rows) -> str:
    """The id of a model trained by the command line."""
    done = server.cli(
        "finetune", str(rows), "--follow", "--suffix", "swap", "--epochs", "2", "--batch-size", "4", "--rank", "4"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"created ftjob-\w{22}", lines[0])
    assert "The job has successfully completed" in lines
    assert re.fullmatch(r"step 8/8  succeeded.*loss \d+\.\d+.*", [x for x in lines if x.startswith("step")][-1])
    found = re.fullmatch(r"succeeded: (ft:tiny-base:\w+:swap:\w+) \((\d+) tokens trained\)", lines[-1])
    assert found and int(found[2]) > 100, lines
    assert "\x1b" not in done.stdout  # no colours, no cursor movements in a pipe
    return found[1]


def test_models_names_the_base_first(server, trained):
    lines = server.cli("models").stdout.splitlines()
    assert lines[0].split("\t")[0] == "tiny-base"
    assert trained in [line.split("\t")[0] for line in lines]
    assert json.loads(server.cli("models", "--json").stdout)[0]["id"] == "tiny-base"


def test_chat_once_from_an_argument_and_from_a_pipe(server, trained):
    sampling = ("--temperature", "0", "--max-tokens", "6", "--system", "Be brief.")
    first = server.cli("chat", *sampling, "one two")
    assert first.returncode == 0 and first.stdout.strip() and not first.stderr
    assert server.cli("chat", *sampling, stdin="one two\n").stdout == first.stdout
    assert server.cli("chat", "-m", trained, *sampling, "one two").returncode == 0
    assert server.cli("chat", stdin=" \n").returncode == 2


def test_chat_reports_the_servers_words(server):
    done = server.cli("chat", "-m", "gpt-9", "hi")
    assert done.returncode == 1 and done.stdout == ""
    assert "gpt-9" in done.stderr and done.stderr.count("\n") == 1
    wrong = server.cli("models", key="sk-cs-wrong")
    assert wrong.returncode == 1 and "COSERVE_API_KEY" in wrong.stderr and "admin-key" in wrong.stderr


def test_jobs_show_list_events_and_checkpoints(server, trained):
    listed = json.loads(server.cli("jobs", "list", "--json").stdout)
    job = next(j["id"] for j in listed if j["fine_tuned_model"] == trained)
    assert f"{job}\tsucceeded\t8/8\t" in server.cli("jobs", "list").stdout
    shown = server.cli("jobs", "show", job).stdout
    assert re.search(rf"finetuned model: +{trained}\n", shown) and re.search(r"steps: +8/8\n", shown)
    events = server.cli("jobs", "events", job, "--limit", "100").stdout
    assert "Fine-tuning job started" in events and "Step 8/8: training loss=" in events
    assert len(server.cli("jobs", "events", job, "--limit", "3").stdout.splitlines()) == 3
    assert trained in server.cli("jobs", "checkpoints", job).stdout
    followed = server.cli("jobs", "follow", job)
    assert followed.returncode == 0 and trained in followed.stdout.splitlines()[-1]
    missing = server.cli("jobs", "show", "ftjob-unknown")
    assert missing.returncode == 1 and missing.stderr.startswith("Error: ")


def test_a_bad_file_fails_with_its_line_and_exit_code_1(server, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": " b"}\n{"prompt": 3}\n')
    done = server.cli("finetune", str(bad), "--follow")
    assert done.returncode == 1
    assert "failed" in done.stderr and "2" in done.stderr, done.stderr
    with server.http() as http:
        before = http.get("/v1/files").json()["data"]
        typo = server.cli("finetune", str(bad), "--validation", str(bad), "--epochs", "999")
        assert typo.returncode == 1 and "n_epochs" in typo.stderr and typo.stderr.count("\n") == 1
        assert http.get("/v1/files").json()["data"] == before, "a job that is refused leaves no file"


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(server, rows):
    process = subprocess.Popen(
        [*COSERVE, "finetune", str(rows), "--follow", "--epochs", "50", "--batch-size", "1"],
        env=server.client_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    job = process.stdout.readline().split()[1]
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert f"coserve jobs follow {job}" in err
    assert json.loads(server.cli("jobs", "show", job, "--json").stdout)["status"] == "running"

    paused = server.cli("jobs", "pause", job)
    assert paused.returncode == 0 and paused.stdout.startswith(f"{job}: ")
    server.until(lambda: "paused" in server.cli("jobs", "show", job).stdout)
    assert server.cli("jobs", "resume", job).returncode == 0
    assert server.cli("jobs", "cancel", job).returncode == 0
    server.until(lambda: "cancelled" in server.cli("jobs", "show", job).stdout)
    ended = server.cli("jobs", "follow", job)
    assert ended.returncode == 1 and f"cancelled: {job}" in ended.stderr


def test_follow_waits_for_a_gateway_that_restarts(server, rows):
    process = subprocess.Popen(
        [*COSERVE, "finetune", str(rows), "--follow", "--epochs", "20", "--batch-size", "1"],
        env=server.client_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    server.kill("gateway")
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert out.splitlines()[-1].startswith("succeeded: ft:")


def test_adapters_go_down_up_and_away(server, trained, tmp_path):
    folder = tmp_path / "adapter"
    done = server.cli("adapters", "download", trained, "-o", str(folder))
    assert done.returncode == 0 and done.stdout == f"{folder}\n", done.stderr
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    up = server.cli("adapters", "upload", "mine", str(folder))
    assert up.returncode == 0 and "version 1, rank 4" in up.stdout, up.stderr
    assert "\tmine\t1\t4\t" in server.cli("adapters", "list").stdout
    assert server.cli("chat", "-m", "mine", "--max-tokens", "2", "hi").returncode == 0
    assert server.cli("adapters", "delete", "mine").returncode == 0
    assert "\tmine\t" not in server.cli("adapters", "list").stdout
    assert server.cli("chat", "-m", "mine", "hi").returncode == 1


def test_keys_are_made_for_a_tenant_that_sees_only_its_own(server, trained):
    made = server.cli("keys", "create", "--tenant", "acme", "--name", "ci")
    assert made.returncode == 0
    key = made.stdout.strip()
    assert key.startswith("sk-cs-") and key not in made.stderr
    assert trained not in server.cli("models", key=key).stdout
    assert server.cli("models", key=key).stdout.startswith("tiny-base\t")
    assert server.cli("keys", "list", key=key).returncode == 1
    listed = [line.split("\t") for line in server.cli("keys", "list").stdout.splitlines()]
    (key_id,) = [line[0] for line in listed if line[1:3] == ["acme", "ci"]]
    assert key not in server.cli("keys", "list", "--json").stdout
    assert server.cli("keys", "delete", key_id).returncode == 0
    gone = server.cli("models", key=key)
    assert gone.returncode == 1 and "COSERVE_API_KEY" in gone.stderr


def test_in_a_terminal_there_is_a_bar_and_ids_stay_whole(server, rows):
    code, out = in_terminal(server, "finetune", str(rows), "--follow", "--suffix", "m", "--epochs", "4")
    assert code == 0, out
    assert "\u2501" in out and re.search(r"8/8\S* succeeded", out), out
    model = re.search(r"New fine-tuned model created: (ft:tiny-base:\w+:m:\w+)\r\n", out)[1]
    assert f"ask it:    coserve chat --model {model}" in out
    _, listed = in_terminal(server, "jobs", "list")
    head, *lines = listed.splitlines()
    assert model in listed and "id" in head
    assert not any("\x1b" in line.removesuffix("\x1b[0m") for line in lines), "only the head is bold"


def test_a_conversation_in_a_terminal(server):
    code, out = in_terminal(server, "chat", "--max-tokens", "4", say=["hello", "/new", "again", "/exit"])
    assert code == 0 and "Error" not in out
    assert out.count("> ") == 4


def in_terminal(server: LiveServer, *arguments: str, say: list[str] | None = None) -> tuple[int, str]:
    """Exit code and output of a command whose three streams are a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**server.client_environment, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [*COSERVE, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    words, out = list(say or []), b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how a terminal says that the last process has left it
            break
        out += piece
        if words and out.endswith(b"> "):
            os.write(ours, words.pop(0).encode() + b"\n")
    os.close(ours)
    return process.wait(100), out.decode(errors="replace")


def test_no_prompt_and_no_key_is_in_the_log(server):
    server.cli("chat", "--max-tokens", "2", "xylophone-in-a-prompt")
    time.sleep(0.2)
    assert "xylophone" not in server.log() and server.key not in server.log()
