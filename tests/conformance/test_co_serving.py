"""The first promises over HTTP, with the official client: one process generates and trains at once, exactly."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time

import pytest
import torch
from live_server import LiveServer
from peft_oracle import (
    assert_greedy_equal,
    distance,
    oracle_model,
    peft_loop,
    prompt,
    save_adapter,
    training_rows,
)  # fmt: skip
from safetensors.torch import load_file
from tiny_models import save_tiny_model

STEPS = 20
TRAINING = {
    "learning_rate": 1e-2, "lr_scheduler": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "shuffle": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "gemma3_text")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("server") / "data"
    with LiveServer(folder, data, train_window=16, slo_itl_ms=100) as live:
        yield live


def upload_rows(client, rows) -> str:
    lines = "\n".join(json.dumps({"input_ids": ids, "labels": labels}) for ids, labels in rows)
    return client.files.create(file=("rows.jsonl", lines.encode()), purpose="fine-tune").id


def create_job(client, file_id: str, *, r: int, alpha: float, seed: int = 3, batch: int = 8, accumulation: int = 1,
               suffix: str | None = None, epochs: int = 1, **training):  # fmt: skip
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=seed, suffix=suffix,
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": batch, "n_epochs": epochs}}},
        extra_body={
            "adapter": {"type": "lora", "r": r, "alpha": alpha},
            "training": {**TRAINING, "gradient_accumulation_steps": accumulation, **training},
        },
    )  # fmt: skip


def wait_job(client, job_id: str, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def download(server, name: str, target) -> dict[str, torch.Tensor]:
    with server.http() as http:
        reply = http.get(f"/v1/adapters/{name}/download")
    assert reply.status_code == 200, reply.text
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as tar:
        tar.extractall(target, filter="data")
    found = next(target.rglob("adapter_model.safetensors"))
    return load_file(found)


def iterations(server) -> list[dict]:
    with server.http() as http:
        return http.get("/v1/coserve/iterations", params={"limit": 2000}).json()["data"]


class Streams(threading.Thread):
    """Keeps one stream of the base model open after the other until it is told to stop."""

    def __init__(self, client) -> None:
        super().__init__(daemon=True)
        self._client, self._over = client, threading.Event()
        self.texts: list[list[int]] = []
        self.errors: list[Exception] = []

    def run(self) -> None:
        try:
            while not self._over.is_set():
                reply = self._client.completions.create(
                    model="tiny", prompt=prompt(12, 1), max_tokens=100, temperature=0, stream=True,
                    extra_body={"return_token_ids": True, "ignore_eos": True},
                )  # fmt: skip
                self.texts.append([t for chunk in reply for c in chunk.choices for t in c.token_ids or []])
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self.errors.append(error)

    def finish(self) -> None:
        self._over.set()
        self.join(60)
        assert not self.errors, self.errors
        assert self.texts


@pytest.fixture
def streams(server):
    running = Streams(server.openai())
    running.start()
    yield running
    running.finish()


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (4, 2), (2, 4)])
def test_a_job_over_http_equals_peft_and_adamw(server, folder, streams, tmp_path, batch, accumulation):
    client = server.openai()
    rows = training_rows(8 * STEPS)
    initial, reference = peft_loop(folder, rows, r=4, alpha=8, seed=3, step_rows=8, steps=STEPS)
    file_id = upload_rows(client, rows)
    job = wait_job(client, create_job(client, file_id, r=4, alpha=8, batch=batch, accumulation=accumulation).id)
    assert job.status == "succeeded", job.error
    got = download(server, job.fine_tuned_model, tmp_path)
    assert distance(got, initial, reference) <= 1e-3
    assert job.trained_tokens == sum(len(ids) for ids, _ in rows)

    kinds = [it["tokens"] for it in iterations(server)]
    assert any(t["decode"] and t["train_forward"] for t in kinds)
    assert any(t["decode"] and t["train_backward"] for t in kinds)

    # The download is a stock PEFT adapter with the same logits, and it is what the server now serves.
    model = oracle_model(folder, next(tmp_path.rglob("adapter_config.json")).parent)
    ids = prompt(20, 9)
    reply = client.completions.create(
        model=job.fine_tuned_model, prompt=ids, max_tokens=12, temperature=0, logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    assert_greedy_equal(model, ids, reply.choices[0].token_ids)
    with torch.no_grad():
        row = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float(), -1)
    assert abs(reply.choices[0].logprobs.token_logprobs[0] - float(row[reply.choices[0].token_ids[0]])) <= 1e-3


def test_the_token_ledger_closes(folder, tmp_path):
    """prompt − cached, completion − 1 and trained tokens equal the sums over all iterations."""
    with LiveServer(folder, tmp_path / "data", train_window=16, slo_itl_ms=100) as live:
        client = live.openai()
        rows = training_rows(24)
        job_id = create_job(client, upload_rows(client, rows), r=4, alpha=8).id
        prefilled = decoded = 0
        for i in range(6):
            usage = client.completions.create(
                model="tiny", prompt=prompt(40, i % 2), max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
            ).usage
            prefilled += usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
            decoded += usage.completion_tokens - 1
        job = wait_job(client, job_id)
        total = {kind: sum(it["tokens"][kind] for it in iterations(live)) for kind in
                 ("prefill", "decode", "train_forward", "head", "train_backward")}  # fmt: skip
        with live.http() as http:
            metrics = http.get("/metrics").text
    assert total["prefill"] == prefilled
    assert total["decode"] == decoded
    assert total["train_forward"] == pytest.approx(job.trained_tokens)
    assert total["train_backward"] == pytest.approx(job.trained_tokens)
    assert total["head"] == sum(sum(label != -100 for label in labels[1:]) for _, labels in rows)
    assert 'coserve_step_tokens_total{kind="train_backward"}' in metrics


def test_base_outputs_are_the_same_before_during_and_after(server, folder, streams, tmp_path):
    client = server.openai()
    ids = prompt(30, 4)

    def base() -> tuple[list[int], list[float]]:
        reply = client.completions.create(
            model="tiny", prompt=ids, max_tokens=24, temperature=0, logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        return reply.choices[0].token_ids, reply.choices[0].logprobs.token_logprobs

    before = base()
    assert_greedy_equal(oracle_model(folder), ids, before[0])
    job = create_job(client, upload_rows(client, training_rows(160)), r=16, alpha=32)
    seen = []
    while client.fine_tuning.jobs.retrieve(job.id).status not in ("succeeded", "failed"):
        seen.append(base())
    assert wait_job(client, job.id).status == "succeeded"
    with server.http() as http:
        for i in range(50):
            name = f"many-{i}"
            archive = io.BytesIO()
            with tarfile.open(fileobj=archive, mode="w") as tar:
                tar.add(save_adapter(tmp_path / name, "gemma3_text", 2 + i % 5, i), arcname=name)
            reply = http.post("/v1/adapters", data={"name": name}, files={"file": (f"{name}.tar", archive.getvalue())})
            assert reply.status_code in (200, 201), reply.text
            client.completions.create(model=name, prompt=prompt(5, i), max_tokens=1)
    for tokens, logprobs in [*seen, base()]:
        assert tokens == before[0]
        assert max(abs(a - b) for a, b in zip(logprobs, before[1], strict=True)) <= 1e-4


def test_a_published_version_serves_the_next_request_and_old_streams_keep_theirs(server, folder, tmp_path):
    client = server.openai()
    ids = prompt(48, 6)
    versions = [save_adapter(tmp_path / f"v{i}", "gemma3_text", 4, seed=20 + i) for i in range(2)]

    def publish(version) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(version, arcname="adapter")
        with server.http() as http:
            reply = http.post("/v1/adapters", data={"name": "moving"}, files={"file": ("a.tar", archive.getvalue())})
        assert reply.status_code in (200, 201), reply.text

    def stream():
        return client.completions.create(
            model="moving", prompt=ids, max_tokens=120, temperature=0, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip

    publish(versions[0])
    old = stream()
    first = next(iter(old))
    publish(versions[1])
    new = client.completions.create(
        model="moving", prompt=ids, max_tokens=20, temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    tokens = [t for chunk in [first, *old] for c in chunk.choices for t in c.token_ids or []]
    assert new.usage.prompt_tokens_details.cached_tokens == 0
    assert len(tokens) == 120
    assert_greedy_equal(oracle_model(folder, versions[0]), ids, tokens)
    assert_greedy_equal(oracle_model(folder, versions[1]), ids, new.choices[0].token_ids)


def test_two_tenants_with_an_adapter_of_the_same_name(server, folder, tmp_path):
    with server.http() as http:
        keys = []
        for tenant in ("north", "south"):
            reply = http.post("/v1/organization/api_keys", json={"tenant": tenant, "name": tenant})
            assert reply.status_code in (200, 201), reply.text
            keys.append(reply.json()["value"] if "value" in reply.json() else reply.json()["key"])
    ids = prompt(64, 8)
    answers, adapters = [], []
    for i, key in enumerate(keys):
        version = save_adapter(tmp_path / f"t{i}", "gemma3_text", 4, seed=40 + i)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(version, arcname="adapter")
        with server.http(key) as http:
            reply = http.post("/v1/adapters", data={"name": "same"}, files={"file": ("a.tar", archive.getvalue())})
            adapters.append(reply.json()["id"])
        client = server.openai(key)
        for model in ("tiny", "same"):
            reply = client.completions.create(
                model=model, prompt=ids, max_tokens=16, temperature=0, logprobs=1,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )  # fmt: skip
            assert reply.usage.prompt_tokens_details.cached_tokens == 0  # the other tenant's prefix is not ours
        assert_greedy_equal(oracle_model(folder, version), ids, reply.choices[0].token_ids)
        answers.append(reply.choices[0].logprobs.token_logprobs)
    assert max(abs(a - b) for a, b in zip(*answers, strict=True)) > 0.01
    unknown = adapters[0][:-4] + "zzzz"
    with server.http(keys[1]) as http:
        foreign, missing = (http.get(f"/v1/adapters/{name}") for name in (adapters[0], unknown))
    assert foreign.status_code == missing.status_code == 404
    assert foreign.text.replace(adapters[0], "ID") == missing.text.replace(unknown, "ID")
