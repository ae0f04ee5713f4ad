"""Training alone, in float32, with a fixed window: kills and pauses cost time and do not change a bit of the result."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from http_actions import create_job, digest_of, every_iteration, job_step, newest_iteration, succeeded, upload_rows
from live_server import LiveServer
from peft_oracle import training_rows

pytestmark = pytest.mark.faults

STEPS = 16
CHECKPOINT_EVERY = 5
PAUSES = 5
ROUNDED = 0.1  # tokens: a window that stops between layers is counted in parts


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    with LiveServer(tiny_model, tmp_path_factory.mktemp("bits") / "data", train_window=16) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.openai(timeout=150) as client:
        yield client


@pytest.fixture(scope="module")
def start(client):
    file_id = upload_rows(client, training_rows(8 * STEPS))
    options = {"r": 4, "alpha": 8, "dropout": 0.1, "shuffle": True, "checkpoint_every": CHECKPOINT_EVERY}
    return lambda: create_job(client, file_id, **options).id


@pytest.fixture(scope="module")
def calm(server, client, start):
    """The digest of the undisturbed run, and the tokens of its steps."""
    job = succeeded(server, client, start())
    return digest_of(server, job.fine_tuned_model), [step["tokens"] for step in steps_on_disk(server, job.id)]


def test_a_kill_9_of_the_engine_in_mid_step(server, client, start, calm):
    digest, tokens = calm
    engine = None
    for _ in range(5):  # jobs; one that has ended before it was met in mid-step is no good
        before = newest_iteration(server)
        job_id = start()
        server.until(lambda job_id=job_id: checkpoints_on_disk(server, job_id))
        engine = stopped_in_mid_step(server, job_id, tokens, before)
        if engine is not None:
            break
    assert engine is not None, "the engine was never seen in mid-step"
    kept = max(checkpoints_on_disk(server, job_id))
    os.kill(engine, signal.SIGKILL)
    server.wait_restarted("engine", engine)
    job = succeeded(server, client, job_id)
    assert digest_of(server, job.fine_tuned_model) == digest
    again = sum(it["tokens"]["train_forward"] for it in every_iteration(server))
    assert kept > 0 and again == pytest.approx(sum(tokens[kept:]), abs=ROUNDED), "it did not go on from its checkpoint"


def test_five_pauses(server, client, start, calm):
    digest, _ = calm
    job_id = start()
    paused_at = []
    for _ in range(PAUSES):
        reached = paused_at[-1] if paused_at else 0
        server.until(lambda reached=reached: job_step(client, job_id) > reached)
        assert client.fine_tuning.jobs.pause(job_id).status == "paused"
        paused_at.append(job_step(client, job_id))
        assert client.fine_tuning.jobs.resume(job_id).status in ("queued", "running")
    assert len(set(paused_at)) == PAUSES and paused_at[-1] < STEPS
    job = succeeded(server, client, job_id)
    assert digest_of(server, job.fine_tuned_model) == digest


def stopped_in_mid_step(server: LiveServer, job_id: str, tokens: list[int], before: int) -> int | None:
    """Stops the engine where it has begun a step and not booked it; its process id, or None if the job was quicker.

    `before` is the newest iteration of the time before the job, which runs alone.
    """
    pid = server.pid("engine")
    while len(steps_on_disk(server, job_id)) < len(tokens):
        forward = sum(it["tokens"]["train_forward"] for it in every_iteration(server, before))
        os.kill(pid, signal.SIGSTOP)
        server.until(lambda: stopped(pid))
        if forward > sum(tokens[: len(steps_on_disk(server, job_id))]) + ROUNDED:
            return pid
        os.kill(pid, signal.SIGCONT)
    return None


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def job_folder(server: LiveServer, job_id: str) -> Path:
    return server.data_dir / "jobs" / job_id


def checkpoints_on_disk(server: LiveServer, job_id: str) -> list[int]:
    """The steps of the whole checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in job_folder(server, job_id).glob("checkpoints/step-*")]


def steps_on_disk(server: LiveServer, job_id: str) -> list[dict]:
    """The data of the steps that the engine has booked, also while it is stopped."""
    lines = (job_folder(server, job_id) / "events.jsonl").read_text().splitlines()
    return [event["data"] for event in map(json.loads, lines) if event["kind"] == "step"]
