"""Finetuning over HTTP: what a create may say, the exact shapes, paging, and one job for one request."""

import asyncio
import json

import httpx
import pytest
from openai import AsyncOpenAI, ConflictError
from scripted_engine import in_world

from coserve.server.store.errors import StoreUnavailable

URL = "/v1/fine_tuning/jobs"
KEYS = {
    "id", "object", "created_at", "model", "organization_id", "seed", "status", "training_file", "validation_file",
    "result_files", "trained_tokens", "error", "finished_at", "fine_tuned_model", "hyperparameters", "estimated_finish",
    "integrations", "metadata", "method",
}  # fmt: skip
PROGRESS = {
    "step", "total_steps", "tokens_per_second", "loss", "queue_position", "eta_seconds", "reason",
    "expected_wait_seconds", "expected_tokens_per_second",
}  # fmt: skip


def test_the_object_has_every_key(tmp_path):
    async def scenario(world):
        job = await world.create(suffix="s", seed=7, metadata={"a": "b"})
        assert set(job) >= KEYS | {"adapter", "training", "progress"} and set(job["progress"]) == PROGRESS
        assert job["object"] == "fine_tuning.job" and job["seed"] == 7 and job["metadata"] == {"a": "b"}
        assert job["result_files"] == [] and job["integrations"] == [] and job["organization_id"] == "a"
        automatic = {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}
        assert job["hyperparameters"] == automatic
        assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": automatic}}
        resolved = {"batch_size": 8, "learning_rate_multiplier": 1.0, "n_epochs": 3}
        queued = await world.status(job["id"], "queued")
        assert queued["hyperparameters"] == resolved
        assert queued["method"] == {"type": "supervised", "supervised": {"hyperparameters": resolved}}
        assert job["adapter"] == {
            "type": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear", "init": "default",
        }  # fmt: skip
        assert job["training"]["learning_rate"] == 2e-4 and job["training"]["max_steps"] is None
        assert (await world.create())["seed"] != (await world.create())["seed"]

    in_world(tmp_path, scenario)


def test_the_deprecated_hyperparameters_are_an_alias(tmp_path):
    async def scenario(world):
        file = await world.upload()
        wanted = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
        old = await world.create(file=file, hyperparameters=wanted)
        new = await world.create(file=file, method={"type": "supervised", "supervised": {"hyperparameters": wanted}})
        assert old["hyperparameters"] == new["hyperparameters"] == wanted
        assert old["training"]["learning_rate"] == new["training"]["learning_rate"] == 1e-4
        for job in (old, new):
            await world.started(job["id"])
            spec = json.loads((world.engine.data_dir / "jobs" / job["id"] / "spec.json").read_text())
            assert (spec["training"]["n_epochs"], spec["training"]["batch_size"]) == (2, 4)
            assert spec["seed"] == job["seed"] and spec["base_digest"] == "b" * 64

    in_world(tmp_path, scenario)


REFUSED = [
    ({"model": None}, "model"), ({"model": "other"}, "model"), ({"training_file": "file-x"}, "training_file"),
    ({"validation_file": "file-x"}, "validation_file"), ({"training_file": 3}, "training_file"),
    ({"suffix": ""}, "suffix"), ({"suffix": "x" * 65}, "suffix"), ({"suffix": "../x"}, "suffix"),
    ({"suffix": "a/b"}, "suffix"), ({"suffix": "a:b"}, "suffix"), ({"suffix": "a..b"}, "suffix"),
    ({"suffix": "%2e%2e"}, "suffix"),
    ({"seed": -1}, "seed"), ({"seed": 2**31}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": True}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"), ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"metadata": {"k": 1}}, "metadata.k"),
    ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"learning_rate": 1}}, "hyperparameters.learning_rate"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
     "method.supervised.hyperparameters.n_epochs"),
    ({"method": {"type": "supervised", "supervised": {"hyper": {}}}}, "method.supervised.hyper"),
    ({"method": {"type": "supervised", "sup": {}}}, "method.sup"), ({"method": {"type": "other"}}, "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
    ({"hyperparameters": {"n_epochs": 1},
      "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
     "hyperparameters.n_epochs"),
    ({"adapter": {"rank": 4}}, "adapter.rank"), ({"adapter": {"r": 0}}, "adapter.r"),
    ({"adapter": {"r": "4"}}, "adapter.r"),
    ({"adapter": {"dropout": 1.0}}, "adapter.dropout"), ({"adapter": {"alpha": 0}}, "adapter.alpha"),
    ({"adapter": {"target_modules": []}}, "adapter.target_modules"),
    ({"adapter": {"target_modules": "q_proj"}}, "adapter.target_modules"),
    ({"adapter": {"target_modules": ["q_proj", 5]}}, "adapter.target_modules[1]"),
    ({"adapter": {"target-modules": []}}, "adapter.target-modules"),
    ({"training": {"learning rate": 1}}, "training.learning rate"),
    ({"adapter": {"target_modules": ["q_proj", "nothing"]}}, "adapter.target_modules"),
    ({"adapter": {"init": "pissa"}}, "adapter.init"), ({"adapter": {"init": "adapter:none"}}, "adapter.init"),
    ({"training": {"learning_rates": 1}}, "training.learning_rates"),
    ({"training": {"learning_rate": 0}}, "training.learning_rate"),
    ({"training": {"learning_rate": 1e-3}, "hyperparameters": {"learning_rate_multiplier": 2}},
     "training.learning_rate"),
    ({"training": {"learning_rate": 1e-3}, "hyperparameters": {"learning_rate_multiplier": "auto"}},
     "training.learning_rate"),
    ({"training": {"lr_scheduler": "step"}}, "training.lr_scheduler"),
    ({"training": {"betas": [0.9]}}, "training.betas"),
    ({"training": {"betas": [0.9, 1.0]}}, "training.betas[1]"),
    ({"training": {"warmup_steps": -1}}, "training.warmup_steps"),
    ({"training": {"max_steps": 0}}, "training.max_steps"), ({"training": {"shuffle": "no"}}, "training.shuffle"),
    ({"training": {"eval_every": 5}}, "training.eval_every"), ({"training": {"priority": "high"}}, "training.priority"),
    ({"training": {"early_stopping_patience": 1}}, "training.early_stopping_patience"),
    ({"sufix": "typo"}, "sufix"),
]  # fmt: skip
UNSUPPORTED = [
    ({"method": {"type": "dpo"}}, "method.type"), ({"method": {"type": "reinforcement"}}, "method.type"),
    ({"integrations": [{"type": "wandb"}]}, "integrations"), ({"adapter": {"type": "dora"}}, "adapter.type"),
    ({"training": {"optimizer": "sgd"}}, "training.optimizer"),
]  # fmt: skip


def test_typos_and_nonsense_do_not_train(tmp_path):
    async def scenario(world):
        file = await world.upload()
        for change, param in REFUSED + UNSUPPORTED:
            body = {"model": "base", "training_file": file, **change}
            answer = await world.a.post(URL, json=body)
            assert answer.status_code in (400, 404), (change, answer.text)
            error = answer.json()["error"]
            assert error["param"] == param, (change, error)
            assert error["message"] and error["code"]
            if (change, param) in UNSUPPORTED:
                assert error["code"] == "unsupported_value", change
        for value, kinds in ((999, "at most 256"), (0, "at least 1"), ("x", "a whole number")):
            answer = await world.a.post(URL, json={**body, "hyperparameters": {"batch_size": value}})
            assert answer.json()["error"]["message"].endswith(f"must be 'auto' or {kinds}.")
        other = await world.upload(purpose="batch")
        answer = await world.a.post(URL, json={"model": "base", "training_file": other})
        assert answer.json()["error"]["param"] == "training_file"
        missing = await world.a.post(URL, json={"model": "base"})
        assert missing.json()["error"]["code"] == "missing_required_parameter"
        assert (await world.a.get(URL)).json()["data"] == []

    in_world(tmp_path, scenario)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model": NaN}', b'{"a":' * 5000, b'{"model": "\\ud800"}', b'{"model": "\\u0000"}']
)
def test_malformed_json(tmp_path, body):
    async def scenario(world):
        answer = await world.a.post(URL, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"

    in_world(tmp_path, scenario)


def test_one_request_is_one_job(tmp_path):
    async def scenario(world):
        file = await world.upload()
        body = {"model": "base", "training_file": file}

        async def post(client, **headers):
            answer = await client.post(URL, json=body, headers=headers)
            return answer.json().get("id") or answer.json()["error"]["code"]

        first = await post(world.a, **{"x-stainless-retry-count": "0"})
        assert await post(world.a, **{"x-stainless-retry-count": "1"}) == first
        again = await post(world.a, **{"x-stainless-retry-count": "0"})
        assert again != first
        keyed = await post(world.a, **{"Idempotency-Key": "k1"})
        assert await post(world.a, **{"Idempotency-Key": "k1"}) == keyed != first
        other = await world.a.post(URL, json={**body, "seed": 1}, headers={"Idempotency-Key": "k1"})
        assert other.status_code == 409
        await world.a.delete(f"/v1/files/{file}")
        assert await post(world.a, **{"Idempotency-Key": "k1"}) == keyed, "a repeat is not checked again"
        assert await post(world.a, **{"Idempotency-Key": "x" * 256}) == "invalid_value"
        file = body["training_file"] = await world.upload()
        raced = await asyncio.gather(*(post(world.a, **{"Idempotency-Key": "k2"}) for _ in range(6)))
        assert len(set(raced)) == 1
        body["training_file"] = await world.upload(world.b)
        assert await post(world.b, **{"Idempotency-Key": "k1"}) not in (keyed, first)

    in_world(tmp_path, scenario)


def test_a_conflict_is_told_once_not_retried(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        world.engine.finish(job_id)
        await world.status(job_id, "succeeded")
        sent = []

        async def count(request):
            sent.append(request.url.path)

        plain = httpx.AsyncClient(transport=world.a._transport, event_hooks={"request": [count]})
        key = world.a.headers["authorization"].removeprefix("Bearer ")
        client = AsyncOpenAI(base_url="http://coserve/v1", api_key=key, http_client=plain, max_retries=2)
        with pytest.raises(ConflictError) as caught:
            await client.fine_tuning.jobs.cancel(job_id)
        assert caught.value.code == "invalid_state_transition" and len(sent) == 1

    in_world(tmp_path, scenario)


def test_lists_and_the_metadata_filter(tmp_path):
    async def scenario(world):
        file = await world.upload()
        ids = [(await world.create(file=file, metadata={"n": str(i % 2)}))["id"] for i in range(5)]
        page = (await world.a.get(URL, params={"limit": 2})).json()
        assert [job["id"] for job in page["data"]] == ids[:2:-1] and page["has_more"] is True
        page = (await world.a.get(URL, params={"limit": 10, "after": ids[3]})).json()
        assert [job["id"] for job in page["data"]] == ids[2::-1] and page["has_more"] is False
        odd = (await world.a.get(URL, params={"metadata[n]": "1"})).json()
        assert [job["id"] for job in odd["data"]] == [ids[3], ids[1]]
        assert (await world.b.get(URL)).json()["data"] == []

    in_world(tmp_path, scenario)


def test_events_are_paged_newest_first(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        for step in range(1, 31):
            world.engine.step(job_id, step, 30)

        async def all_there():
            return (await world.job(job_id))["progress"]["step"] == 30

        await world.until(all_there)
        page = (await world.a.get(f"{URL}/{job_id}/events")).json()
        assert len(page["data"]) == 20 and page["has_more"] is True
        event = page["data"][0]
        assert event["object"] == "fine_tuning.job.event" and event["id"].startswith("ftevent-")
        assert event["message"] == "Step 30/30: training loss=1.50" and event["type"] == "metrics"
        assert event["data"]["step"] == 30 and event["data"]["train_loss"] == 1.5
        rest = (await world.a.get(f"{URL}/{job_id}/events", params={"after": page["last_id"], "limit": 100})).json()
        assert rest["has_more"] is False and len(rest["data"]) == 34 - 20
        assert rest["data"][-1]["message"].startswith("Created fine-tuning job")

    in_world(tmp_path, scenario)


def test_streamed_events_follow_the_job_to_its_end(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        follow = asyncio.create_task(world.a.get(f"{URL}/{job_id}/events", params={"stream": "true"}))
        await asyncio.sleep(0.05)
        world.engine.step(job_id, 1)
        await asyncio.sleep(0.05)
        world.engine.finish(job_id)
        answer = await follow
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert events[0]["message"].startswith("Created") and events[-1]["message"].endswith("successfully completed")
        assert [e["message"] for e in events] == await world.messages(job_id)
        assert not any(line.startswith("id:") for line in answer.text.splitlines())
        assert (await world.b.get(f"{URL}/{job_id}/events", params={"stream": "true"})).status_code == 404
        assert world.services.controller.signals._waiting == {}

    in_world(tmp_path, scenario)


def test_a_stream_of_events_that_fails_says_so(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        since = world.services.store.events.since

        async def failing(tenant, job, position):
            if position:
                raise StoreUnavailable("the disk is away")
            return await since(tenant, job, position)

        world.services.store.events.since = failing
        answer = await world.a.get(f"{URL}/{job_id}/events", params={"stream": "true"})
        *events, last = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
        assert len(events) >= 3 and "[DONE]" not in answer.text and "disk" not in answer.text
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "storage_unavailable"
        assert world.services.controller.signals._waiting == {}

    in_world(tmp_path, scenario)


def test_training_goes_on_from_an_adapter(tmp_path):
    async def scenario(world):
        job_id = await world.running(suffix="one")
        world.engine.finish(job_id)
        model = (await world.status(job_id, "succeeded"))["fine_tuned_model"]
        adapter = (await world.a.get("/v1/adapters")).json()["data"][0]
        config = {"r": 4, "alpha": 8}
        for body in (
            {"adapter": {"init": f"adapter:{adapter['id']}"}}, {"model": model},
            {"adapter": {"init": f"adapter:{model}"}},
        ):  # fmt: skip
            job = await world.create(**body)
            assert {name: job["adapter"][name] for name in config} == config
            assert set(job["adapter"]) == {"type", "r", "alpha", "dropout", "target_modules", "init"}
            await world.started(job["id"])
            folder = world.engine.data_dir / "jobs" / job["id"]
            spec = json.loads((folder / "spec.json").read_text())
            assert spec["adapter"]["init"] == f"jobs/{job['id']}/init"
            assert (folder / "init" / "adapter_model.safetensors").read_bytes() == b"final"
        body = {"model": "base", "training_file": await world.upload()}
        answer = await world.a.post(URL, json={**body, "adapter": {"init": f"adapter:{adapter['id']}", "r": 5}})
        assert answer.json()["error"]["param"] == "adapter.r"
        answer = await world.a.post(URL, json={**body, "adapter": {"init": f"adapter:{adapter['id']}", "r": 4}})
        assert answer.status_code == 200
        mine = await world.upload(world.b)
        for init in (adapter["id"], model, "adapter-none"):
            answer = await world.b.post(
                URL, json={"model": "base", "training_file": mine, "adapter": {"init": f"adapter:{init}"}}
            )
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "adapter_not_found"

    in_world(tmp_path, scenario)
