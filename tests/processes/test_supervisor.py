"""What the supervisor promises of any pair of children: restarts, order of the end, exit codes, no orphans."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time

import pytest


def test_sigterm_drains_the_gateway_then_the_engine_and_leaves_nothing(launch):
    server = launch(drain=0.2)
    server.wait_ready()
    run = next(server.tmp.glob("coserve-*"))
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "settings.json").stat().st_mode) == 0o600
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0
    assert [(n, e) for n, e, _ in server.events() if e != "start"] == [
        ("gateway", "term"), ("gateway", "end"), ("engine", "term"), ("engine", "end"),
    ]  # fmt: skip
    assert not list(server.tmp.iterdir()) and not (server.data / "run").exists()


def test_the_ready_lines_name_the_url_and_keep_the_key_out_of_pipes(launch):
    server = launch()
    export = server.wait_ready()
    assert export.startswith(f"export OPENAI_BASE_URL=http://127.0.0.1:{server.port}/v1 OPENAI_API_KEY=")
    key = (server.data / "admin-key").read_text().strip()
    assert "admin-key" in export and key not in export and key not in server.err.read_text()
    assert str(server.pid("engine")) in server.err.read_text() and str(server.pid("gateway")) in server.err.read_text()


@pytest.mark.parametrize("name", ["engine", "gateway"])
def test_a_killed_child_is_started_again_alone(launch, name):
    server = launch()
    server.wait_ready()
    other = "gateway" if name == "engine" else "engine"
    before, kept = server.pid(name), server.pid(other)
    os.kill(before, signal.SIGKILL)
    server.until(lambda: server.pid(name) != before)
    assert server.pid(other) == kept and launch.alive(kept)
    assert server.get() == server.pid("gateway")


def test_a_request_made_while_the_gateway_restarts_waits_and_is_answered(launch):
    server = launch()
    server.wait_ready()
    before = server.pid("gateway")
    os.kill(before, signal.SIGKILL)
    assert server.get() != before


def test_kill_9_of_the_supervisor_leaves_no_orphan_and_a_free_port(launch):
    server = launch()
    server.wait_ready()
    pids = [server.pid("engine"), server.pid("gateway")]
    server.process.kill()
    server.until(lambda: not any(map(launch.alive, pids)), seconds=20)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))
    left = list(server.tmp.glob("coserve-*"))
    assert left
    again = launch(port=server.port)  # at once, on the same data directory and port
    again.wait_ready()
    assert not left[0].exists() and len(list(server.tmp.glob("coserve-*"))) == 1


@pytest.mark.parametrize("code", [2, 3])
def test_a_refusal_ends_everything_with_its_code_and_reason(launch, code):
    engine = launch.child + f"heartbeat.last_words('no attention\\n in this model'); sys.exit({code})"
    server = launch(engine=engine)
    assert server.exit_code() == code
    assert server.err.read_text().endswith("coserve: no attention in this model\n")
    assert len(server.events("engine", "start")) == 1
    assert not any(launch.alive(pid) for _, _, pid in server.events())


def test_a_child_that_never_starts_is_not_tried_for_ever(launch):
    server = launch(engine=launch.child + "sys.exit(1)")
    start = time.monotonic()
    assert server.exit_code() == 1
    assert len(server.events("engine", "start")) == 4
    assert time.monotonic() - start > 0.05 + 0.1 + 0.2  # it waited longer each time
    assert "did not start in 4 attempts" in server.err.read_text()


def test_a_child_that_worked_once_is_started_for_ever(launch):
    server = launch(engine=launch.child + "heartbeat.beat(); time.sleep(0.05); sys.exit(1)")
    server.until(lambda: len(server.events("engine", "start")) > 6)
    assert server.process.poll() is None


def test_a_stopped_child_is_killed_and_started_again(launch):
    server = launch(silence=1.5)
    server.wait_ready()
    before = server.pid("engine")
    os.kill(before, signal.SIGSTOP)
    server.until(lambda: server.pid("engine") != before)
    assert not launch.alive(before)
    assert "is stuck" in server.err.read_text()


def test_a_long_start_is_no_silence(launch):
    server = launch(engine=launch.child + "time.sleep(3)\n" + launch.engine.removeprefix(launch.child), silence=1.5)
    server.wait_ready()
    time.sleep(2.5)
    assert len(server.events("engine", "start")) == 1


def test_a_child_that_does_not_end_is_killed_inside_the_grace_period(launch):
    server = launch(drain=600, grace=2)
    server.wait_ready()
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 1
    assert 1.3 < time.monotonic() - start < 2 + 5  # five for what else the machine does
    assert not launch.alive(server.pid("engine")) and not launch.alive(server.pid("gateway"))


def test_a_second_signal_stops_at_once(launch):
    server = launch(drain=600, grace=120)
    server.wait_ready()
    server.process.send_signal(signal.SIGINT)
    server.until(lambda: server.events("gateway", "term"))
    start = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.exit_code() == 1
    assert time.monotonic() - start < 15, "the grace period is 120 s"


def test_ctrl_c_at_the_terminal_is_for_the_supervisor_alone(launch):
    server = launch(drain=0.1)
    server.wait_ready()
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.exit_code() == 0
    assert [(n, e) for n, e, _ in server.events(event="end")] == [("gateway", "end"), ("engine", "end")]


def test_nobody_is_let_in_while_the_engine_saves_its_jobs(launch):
    server = launch(drain=0.3)
    server.wait_ready()
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.events("engine", "term"))
    with pytest.raises(ConnectionRefusedError):
        server.get()
    assert server.exit_code() == 0


def test_the_next_server_waits_for_the_children_of_a_killed_one(launch):
    """A child may need a moment to notice that it is alone, and may be in the middle of a write."""
    slow = launch.child.replace("\nwatch_lifeline()", "") + (
        "while not os.path.exists(settings['data_dir'] + '/go'): time.sleep(0.02)\n"
    )
    first = launch(engine=slow)
    first.wait_ready()
    engine = first.pid("engine")
    first.process.kill()
    second = launch()
    time.sleep(0.8)
    assert [pid for _, _, pid in first.events("engine", "start")] == [engine]
    (first.data / "go").touch()
    second.wait_ready()
    assert not launch.alive(engine)


def test_a_signal_while_a_child_waits_to_be_started_again(launch):
    server = launch(engine=launch.child + "heartbeat.beat(); time.sleep(0.02); sys.exit(1)")
    server.until(lambda: len(server.events("engine", "start")) > 3)
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0


def test_a_second_server_on_the_same_data_directory_is_refused(launch):
    first = launch()
    first.wait_ready()
    start = time.monotonic()
    second = launch()
    assert second.exit_code() == 4
    assert time.monotonic() - start < 3
    assert f"in use by another server (process {first.process.pid})" in second.err.read_text()
    assert first.process.poll() is None


def test_a_taken_port_is_refused_before_anything_starts(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = launch(port=port)
        assert server.exit_code() == 5
    assert f"port {port}" in server.err.read_text() and "--port" in server.err.read_text()
    assert not server.events() and not list(server.tmp.iterdir())
