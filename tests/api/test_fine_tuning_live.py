"""The official client, unmodified, against a whole server with a tiny model: files, jobs, checkpoints, adapters."""

import io
import json
import tarfile
import time

import openai
import pytest
from live_server import LiveServer
from tiny_models import save_tiny_model

SHORT = {"adapter": {"r": 4, "alpha": 8}, "training": {"learning_rate": 1e-2, "lr_scheduler": "constant"}}
LONG = {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    with LiveServer(save_tiny_model(folder / "tiny"), folder / "data", max_model_len=128) as live:
        yield live


@pytest.fixture(scope="module")
def client(server):
    made = server.http().post("/v1/organization/api_keys", json={"tenant": "acme"}).json()
    return server.openai(made["key"], max_retries=0)


@pytest.fixture(scope="module")
def file(client):
    rows = [{"prompt": f"say {i}", "completion": f" number {i}"} for i in range(24)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=("train.jsonl", content), purpose="fine-tune").id


def wait(client, job_id, *statuses, seconds=200):
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert job.status not in ("succeeded", "failed", "cancelled"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


@pytest.fixture(scope="module")
def trained(client, file):
    """A finished job with checkpoints and a validation file."""
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file, validation_file=file, suffix="mine", seed=3, metadata={"run": "1"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
        extra_body={**SHORT, "training": {**SHORT["training"], "checkpoint_every": 2, "eval_every": 3}},
    )  # fmt: skip
    return wait(client, job.id, "succeeded")


def test_a_job_as_the_client_sees_it(client, trained):
    assert trained.object == "fine_tuning.job" and trained.error is None and trained.seed == 3
    assert trained.fine_tuned_model == f"ft:tiny:acme:mine:{trained.id.removeprefix('ftjob-')}"
    assert trained.hyperparameters.n_epochs == 2 and trained.method.supervised.hyperparameters.batch_size == 8
    assert trained.trained_tokens > 0 and trained.finished_at >= trained.created_at
    assert trained.model_extra["progress"]["step"] == trained.model_extra["progress"]["total_steps"] == 6
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=3))  # pages by itself
    assert len({event.id for event in events}) == len(events)
    messages = [event.message for event in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {trained.id}"
    assert "Files validated, moving job to queued state" in messages and "Fine-tuning job started" in messages
    assert messages[-1] == "The job has successfully completed"
    metrics = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in reversed(metrics)] == [1, 2, 3, 4, 5, 6]
    assert {event.data["step"] for event in metrics if "valid_loss" in event.data} >= {3, 6}
    table = client.files.content(trained.result_files[0]).text.splitlines()
    assert table[0] == "step,train_loss,train_mean_token_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(table) == 7
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"run": "1"})] == [trained.id]
    assert list(client.fine_tuning.jobs.list(metadata={"run": "2"})) == []


def test_the_model_and_its_checkpoints_answer(client, trained):
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 4, 2]
    assert checkpoints[0].metrics.step == 6 and checkpoints[0].metrics.train_loss > 0
    ids = {model.id for model in client.models.list()}
    assert trained.fine_tuned_model in ids
    prompt = {"prompt": "say 3", "max_tokens": 8, "temperature": 0}
    texts = [
        client.completions.create(model=model, **prompt).choices[0].text
        for model in ("tiny", trained.fine_tuned_model, *(c.fine_tuned_model_checkpoint for c in checkpoints))
    ]
    assert texts[1] != texts[0], "training changed nothing"
    assert texts[2] == texts[1], "the last checkpoint is the model"


def test_the_download_can_be_uploaded_again_and_answers_the_same(client, server, trained):
    http = server.http(client.api_key)
    tar = http.get(f"/v1/adapters/{trained.fine_tuned_model}/download")
    assert tar.status_code == 200
    answer = http.post("/v1/adapters", files={"file": ("a.tar", tar.content)}, data={"name": "copy"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["rank"] == 4 and answer.json()["version"] == 1
    prompt = {"prompt": "say 3", "max_tokens": 8, "temperature": 0}
    texts = {client.completions.create(model=m, **prompt).choices[0].text for m in (trained.fine_tuned_model, "copy")}
    assert len(texts) == 1
    assert http.delete("/v1/adapters/copy").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="copy", **prompt)
    gone = server.data_dir / "adapters"
    server.until(lambda: not list(gone.glob(f"*/{answer.json()['id']}/*")))


@pytest.mark.security
def test_hostile_adapters_are_refused_by_name_and_the_engine_lives(client, server, trained):
    http = server.http(client.api_key)
    tar = http.get(f"/v1/adapters/{trained.fine_tuned_model}/download").content
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        good = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    config = json.loads(good["adapter_config.json"])
    tensors = good["adapter_model.safetensors"]
    canary = server.data_dir / "canary"
    pid = server.pid("engine")
    for name, changed in {
        "use_dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["lm_head"]}, "bias": {"bias": "all"},
        "auto_mapping": {"auto_mapping": {"base_model_class": "X", "parent_library": f"os.system('touch {canary}')"}},
        "r": {"r": 5}, "peft_type": {"peft_type": "IA3"}, "strange": {"strange": "value"},
    }.items():  # fmt: skip
        answer = upload(http, json.dumps({**config, **changed}).encode(), tensors)
        assert answer.status_code == 400, name
        assert answer.json()["error"]["code"] == "invalid_adapter" and answer.json()["error"]["message"]
    huge = (2**60).to_bytes(8, "little")
    for bad in (b"", b"\0" * 7, tensors[:200], tensors[:-4], huge + tensors[8:], tensors + b"more", b"\x80\x04pickle"):
        answer = upload(http, good["adapter_config.json"], bad)
        assert answer.status_code == 400, bad[:10]
    nan = bytearray(tensors)
    nan[-4:] = b"\0\0\xc0\x7f"
    answer = upload(http, good["adapter_config.json"], bytes(nan))
    assert answer.status_code == 400 and "lora" in answer.json()["error"]["param"]
    assert not canary.exists() and server.pid("engine") == pid
    assert [a["name"] for a in http.get("/v1/adapters").json()["data"]] == [trained.id]
    assert list((server.data_dir / "tmp").iterdir()) == []


def upload(http, config, tensors):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (("adapter_config.json", config), ("adapter_model.safetensors", tensors)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return http.post("/v1/adapters", files={"file": ("a.tar.gz", buffer.getvalue())}, data={"name": "hostile"})


def test_training_goes_on_from_a_model(client, file, trained):
    job = client.fine_tuning.jobs.create(
        model=trained.fine_tuned_model, training_file=file, suffix="more",
        extra_body={"training": {"learning_rate": 1e-2, "max_steps": 2}},
    )  # fmt: skip
    assert job.model_extra["adapter"]["r"] == 4
    done = wait(client, job.id, "succeeded")
    first = next(e for e in client.fine_tuning.jobs.list_events(job.id) if e.type == "metrics" and e.data["step"] == 1)
    begun = next(
        e for e in client.fine_tuning.jobs.list_events(trained.id) if e.type == "metrics" and e.data["step"] == 1
    )
    assert first.data["train_loss"] < begun.data["train_loss"]
    assert done.fine_tuned_model != trained.fine_tuned_model


def test_pause_resume_and_cancel(client, server, file):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, **LONG)
    wait(client, job.id, "running")
    started = time.monotonic()
    paused = client.fine_tuning.jobs.pause(job.id)
    assert paused.status == "paused" and time.monotonic() - started < 60
    step = client.fine_tuning.jobs.retrieve(job.id).model_extra["progress"]["step"]
    time.sleep(0.3)
    assert client.fine_tuning.jobs.retrieve(job.id).model_extra["progress"]["step"] == step
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait(client, job.id, "running")
    server.until(lambda: client.fine_tuning.jobs.retrieve(job.id).model_extra["progress"]["step"] > step)
    with pytest.raises(openai.ConflictError) as caught:
        client.fine_tuning.jobs.resume(job.id)
    assert caught.value.code == "invalid_state_transition"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    server.until(lambda: not (server.data_dir / "jobs" / job.id / "tokens").exists())


def test_events_stream_while_it_trains(client, server, file):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"training": {"max_steps": 4}})
    with server.http(client.api_key).stream(
        "GET", f"/v1/fine_tuning/jobs/{job.id}/events", params={"stream": "true"}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    messages = [json.loads(line.removeprefix("data: "))["message"] for line in lines[:-1]]
    assert sum(message.startswith("Step ") for message in messages) == 4


def test_a_client_that_retries_makes_one_job(client, server, file):
    retrying = server.openai(client.api_key, max_retries=2)
    body = {"model": "tiny", "training_file": file, "extra_body": {"training": {"max_steps": 1}}}
    first = retrying.fine_tuning.jobs.create(**body)
    again = retrying.fine_tuning.jobs.create(**body, extra_headers={"x-stainless-retry-count": "1"})
    assert first.id == again.id
    wait(client, first.id, "succeeded")


def test_iterations_carry_training_tokens(server, trained):
    data = server.http().get("/v1/coserve/iterations", params={"limit": 2000}).json()["data"]
    assert any(entry["tokens"]["train_forward"] for entry in data)
    assert any(entry["tokens"]["train_backward"] for entry in data)
