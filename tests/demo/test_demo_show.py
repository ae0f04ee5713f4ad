"""The whole show on a tiny model: it ends by itself, its claims hold, and it fails when one does not."""

import re
import signal
import subprocess
import sys
import time

import pytest
from tiny_models import save_tiny_model

SHOW = """
import sys
from pathlib import Path
from coserve.server.demo.show import Plan, main
options = ("--threads", "1", "--slo-itl-ms", "1000", "--dtype", "float32")
plan = Plan(model=sys.argv[1], data_dir=Path(sys.argv[2]), streams=2, steps=2, held_out=3, alone_seconds=0.5,
            server_options=options)
sys.exit(main(plan=plan))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "a tiny model", "llama", seed=3)


def start(model, data_dir):
    return subprocess.Popen(
        [sys.executable, "-P", "-c", SHOW, str(model), str(data_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def server_is_gone(data_dir):
    return not (data_dir / "run").exists()


@pytest.mark.timeout(600)
def test_the_show_ends_by_itself_and_holds(model, tmp_path):
    show = start(model, tmp_path / "data")
    try:
        shown, _ = show.communicate(timeout=550)
    finally:
        show.kill()
    assert show.returncode == 0, shown
    assert "✗" not in shown.split("What this showed:")[1]
    assert re.search(r"of \d+ iterations, [1-9]\d* carried decode tokens and training tokens", shown)
    assert "All of it held" in shown
    assert "coserve serve --model" in shown and "curl" in shown and "from openai import OpenAI" in shown
    assert server_is_gone(tmp_path / "data")


def test_a_refused_model_ends_the_show_with_the_servers_words(tmp_path):
    show = start(tmp_path / "no-such-model", tmp_path / "data")
    shown, _ = show.communicate(timeout=150)
    assert show.returncode == 1
    assert "did not come to its end" in shown and "no-such-model" in shown


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_signal_stops_the_server_too(model, tmp_path, number, code):
    show = start(model, tmp_path / "data")
    try:
        deadline = time.monotonic() + 150
        for line in show.stdout:
            if "Ready at" in line:
                break
            assert time.monotonic() < deadline
        show.send_signal(number)
        shown, _ = show.communicate(timeout=150)
    finally:
        show.kill()
    assert show.returncode == code, shown
    assert "the server is stopped" in shown
    assert server_is_gone(tmp_path / "data")
