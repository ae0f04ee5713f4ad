"""What conformance and fault tests do to a whole server over HTTP, with the official client. For tests only."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from live_server import LiveServer
from peft_oracle import Row, oracle_model
from safetensors.torch import load_file

EXACT = {"return_token_ids": True, "ignore_eos": True}
TRAINING = {
    "learning_rate": 1e-2, "lr_scheduler": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "shuffle": False,
}  # fmt: skip


def greedy(client: Any, model: str, ids: list[int], tokens: int, **options: Any) -> Any:
    """A greedy completion of token ids that never ends early, with the ids and log-probabilities of its tokens."""
    return client.completions.create(
        model=model, prompt=ids, max_tokens=tokens, temperature=0, logprobs=1, extra_body=EXACT, **options
    )


def upload_rows(client: Any, rows: list[Row]) -> str:
    """The id of a file of pre-tokenized rows."""
    lines = "\n".join(json.dumps({"input_ids": ids, "labels": labels}) for ids, labels in rows)
    return client.files.create(file=("rows.jsonl", lines.encode()), purpose="fine-tune").id


def create_job(
    client: Any, file_id: str, *, r: int, alpha: float, seed: int = 3, batch: int = 8, epochs: int = 1,
    dropout: float = 0.0, **training: Any,
) -> Any:  # fmt: skip
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=seed,
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": batch, "n_epochs": epochs}}},
        extra_body={
            "adapter": {"type": "lora", "r": r, "alpha": alpha, "dropout": dropout},
            "training": {**TRAINING, **training},
        },
    )  # fmt: skip


def job_step(client: Any, job_id: str) -> int:
    return client.fine_tuning.jobs.retrieve(job_id).progress["step"] or 0


def succeeded(server: LiveServer, client: Any, job_id: str, seconds: float = 200) -> Any:
    """The job, once it has succeeded."""

    def over() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job.status in ("succeeded", "failed", "cancelled") and job

    job = server.until(over, seconds)
    assert job.status == "succeeded", job.error
    return job


def download_adapter(server: LiveServer, name: str, target: Path) -> Path:
    """The PEFT folder of an adapter, unpacked below `target`."""
    with server.http() as http:
        reply = http.get(f"/v1/adapters/{name}/download")
    assert reply.status_code == 200, reply.text
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as tar:
        tar.extractall(target, filter="data")
    return next(target.rglob("adapter_config.json")).parent


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def upload_adapter(server: LiveServer, name: str, folder: Path, key: str | None = None) -> dict[str, Any]:
    """The adapter's object after a PEFT folder was uploaded under a name."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(folder, arcname="adapter")
    with server.http(key) as http:
        reply = http.post("/v1/adapters", data={"name": name}, files={"file": ("a.tar", archive.getvalue())})
    assert reply.status_code == 200, reply.text
    return reply.json()


def digest_of(server: LiveServer, name: str) -> str:
    with server.http() as http:
        return http.get(f"/v1/adapters/{name}").json()["digest"]


def iterations(server: LiveServer, after: int = 0) -> list[dict[str, Any]]:
    """Of the 2,000 iterations that the engine remembers, those with a number above `after`, oldest first."""
    with server.http() as http:
        found = http.get("/v1/coserve/iterations", params={"limit": 2000}).json()["data"]
    return [it for it in found if it["seq"] > after]


def every_iteration(server: LiveServer, after: int = 0) -> list[dict[str, Any]]:
    """The same where none may be missing, because they are summed."""
    found = iterations(server, after)
    assert not found or found[0]["seq"] == after + 1, "the first of them are forgotten: ask sooner"
    return found


def newest_iteration(server: LiveServer) -> int:
    with server.http() as http:
        found = http.get("/v1/coserve/iterations", params={"limit": 1}).json()["data"]
    return found[-1]["seq"] if found else 0


def wait_idle(server: LiveServer) -> int:
    """Until the engine runs nothing any more; the number of its newest iteration."""

    def still() -> bool:
        before = newest_iteration(server)
        time.sleep(0.1)
        return newest_iteration(server) == before

    server.until(still)
    return newest_iteration(server)


def metrics(server: LiveServer) -> dict[str, float]:
    """Every series of /metrics as it is written there."""
    with server.http() as http:
        text = http.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(coserve_\S+) (\S+)$", text, re.MULTILINE)}


def assert_same_logits(client: Any, model: str, ids: list[int], base: Path, adapter: Path, within: float) -> None:
    """What the server says of every token of `ids`, and of the 20 likeliest in its place, is what stock PEFT says."""
    choice = client.completions.create(
        model=model, prompt=ids, max_tokens=0, echo=True, logprobs=20, extra_body={"return_token_ids": True}
    ).choices[0]
    with torch.no_grad():
        logits = oracle_model(base, adapter)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    expected = torch.log_softmax(logits, -1)
    for position, (row, token) in enumerate(zip(expected, ids[1:], strict=False), start=1):
        assert abs(choice.logprobs.token_logprobs[position] - float(row[token])) <= within
        best = sorted(choice.logprobs.top_logprobs[position].values(), reverse=True)[:20]
        assert torch.allclose(torch.tensor(best), row.topk(len(best)).values, atol=within, rtol=0)
