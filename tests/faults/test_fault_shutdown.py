"""SIGTERM under load, and starts that must be refused with the right exit code and a remedy."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from fault_load import Job, Stream
from live_server import COSERVE, LiveServer, alive
from tiny_models import save_tiny_model

pytestmark = pytest.mark.faults


def test_sigterm_with_streams_and_a_job(tiny_model, tmp_path):
    data = tmp_path / "data"
    with LiveServer(tiny_model, data, grace_seconds=120) as server:
        job = Job(server, 200, checkpoint_every=1000)
        job.until_step(5)
        streams = [Stream(server) for _ in range(3)]
        pids = [server.pid("engine"), server.pid("gateway")]
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 60, "it waits for what runs, and no longer"
        for stream in streams:
            stream.wait(60)
            assert stream.finish == "length" and stream.error is None, stream.error
        assert not any(map(alive, pids))
    # what the end has saved is all there is, and the job goes on from there
    saved = [path.name for path in (data / "jobs" / job.id / "checkpoints").iterdir()]
    assert len(saved) == 1 and int(saved[0].removeprefix("step-")) >= 5
    with LiveServer(tiny_model, data, grace_seconds=2) as again:
        job.server = again
        assert job.succeeded().progress["step"] == 200
        events = again.openai().fine_tuning.jobs.list_events(job.id, limit=100)
        assert [e.data["step"] for e in events if e.type == "metrics"].count(1) == 1
        a_stream_longer_than_the_grace_period_ends_with_an_error(again)


def a_stream_longer_than_the_grace_period_ends_with_an_error(server: LiveServer) -> None:
    engine = server.pid("engine")
    stream = Stream(server, max_tokens=490)
    os.kill(engine, signal.SIGSTOP)  # no token comes any more
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 1  # the engine had to be killed
    assert time.monotonic() - start < 2 + 8
    stream.wait(60)
    assert stream.error is not None and stream.finish is None
    assert not alive(engine)


def serve(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run([*COSERVE, "serve", *arguments], capture_output=True, text=True, timeout=seconds)


def test_a_taken_port_exits_5(tiny_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--model", str(tiny_model), "--data-dir", str(tmp_path / "d"), "--port", str(port))
    assert done.returncode == 5 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(port) in done.stderr and "--port" in done.stderr


def test_another_base_model_on_the_same_data_directory_exits_4(tiny_model, tmp_path):
    data, other = tmp_path / "data", save_tiny_model(tmp_path / "other", seed=1)
    with LiveServer(tiny_model, data, grace_seconds=2):
        pass
    refused = serve("--model", str(other), "--data-dir", str(data), "--port", "0", "--threads", "1")
    assert refused.returncode == 4 and refused.stdout == "", refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("coserve: The data directory")
    assert "--data-dir" in last and "the model it was made for" in last
    assert "ended for good (exit code 4)" in refused.stderr and refused.stderr.count("gateway started") == 1
    with LiveServer(tiny_model, data, grace_seconds=2) as again:
        assert again.is_ready()


@pytest.mark.parametrize("fault", ["truncated", "no tokenizer", "pickle only", "config is no JSON"])
def test_a_bad_model_folder_exits_3_with_the_reason(tiny_model, tmp_path, fault):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = model / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "no tokenizer":
        for path in model.glob("tokenizer*"):
            path.unlink()
    elif fault == "pickle only":
        weights.rename(model / "pytorch_model.bin")
    else:
        (model / "config.json").write_text("{")
    done = serve("--model", str(model), "--data-dir", str(tmp_path / "data"), "--port", "0")
    assert done.returncode == 3 and done.stdout == "", done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("coserve: ") and len(last) > 20
    assert "Traceback" not in done.stderr
