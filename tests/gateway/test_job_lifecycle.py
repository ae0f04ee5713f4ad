"""Jobs from their file to their model through the whole gateway, against an engine that does what the test says."""

import hashlib

from scripted_engine import in_world


def test_a_job_runs_from_its_file_to_its_model(tmp_path):
    async def scenario(world):
        job = await world.create(suffix="mine", metadata={"k": "v"})
        assert job["status"] == "validating_files"
        assert job["fine_tuned_model"] is None and job["finished_at"] is None and job["error"] is None
        job_id, engine = job["id"], world.engine
        await world.started(job_id)
        folder = engine.data_dir / "jobs" / job_id
        assert (folder / "spec.json").exists() and (folder / "tokens" / "train.safetensors").exists()
        engine.tell(job_id, "started", "Fine-tuning job started", total_steps=9)
        await world.status(job_id, "running")
        for step in (1, 2, 3):
            engine.step(job_id, step, 9)
        digest = engine.checkpoint(job_id, 3)
        engine.step(job_id, 4, 9, loss=0.75)

        async def step_four():
            return (await world.job(job_id))["progress"]["step"] == 4

        await world.until(step_four)
        job = await world.job(job_id)
        assert job["progress"]["loss"] == 0.75 and job["progress"]["total_steps"] == 9
        assert job["progress"]["tokens_per_second"] > 0 and job["progress"]["eta_seconds"] >= 0
        assert job["estimated_finish"] is not None
        checkpoints = (await world.a.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")).json()
        assert [c["step_number"] for c in checkpoints["data"]] == [3] and checkpoints["has_more"] is False
        name = checkpoints["data"][0]["fine_tuned_model_checkpoint"]
        assert name == f"ft:base:a:mine:{job_id.removeprefix('ftjob-')}:ckpt-step-3"
        model = await world.services.store.models.resolve((await tenant(world)), name)
        assert model is not None and model.digest == digest
        final = engine.finish(job_id, 9)
        job = await world.status(job_id, "succeeded")
        assert job["fine_tuned_model"] == name.removesuffix(":ckpt-step-3")
        assert job["trained_tokens"] == 1234 and job["finished_at"] and job["estimated_finish"] is None
        assert (await world.a.get(f"/v1/models/{job['fine_tuned_model']}")).status_code == 200
        version = await world.services.store.models.resolve(await tenant(world), job["fine_tuned_model"])
        assert version.digest == final
        copied = sorted(path.name for path in (engine.data_dir / version.path).iterdir())
        assert copied == ["adapter_config.json", "adapter_model.safetensors"]
        result = (await world.a.get(f"/v1/files/{job['result_files'][0]}")).json()
        assert result["purpose"] == "fine-tune-results"
        content = await world.a.get(f"/v1/files/{job['result_files'][0]}/content")
        assert content.content == b"step,train_loss\n1,1.5\n"
        messages = await world.messages(job_id)
        assert messages[:4] == [
            f"Created fine-tuning job: {job_id}", f"Validating training file: {job['training_file']}",
            "Files validated, moving job to queued state", "Fine-tuning job started",
        ]  # fmt: skip
        assert messages[4] == "Step 1/9: training loss=1.50"
        assert messages[-2:] == [
            f"New fine-tuned model created: {job['fine_tuned_model']}", "The job has successfully completed"
        ]  # fmt: skip
        assert not (folder / "tokens").exists()

    in_world(tmp_path, scenario)


async def tenant(world):
    return (await world.services.store.tenants.by_name("a")).id


def test_a_faulty_file_fails_the_job_with_its_lines(tmp_path):
    async def scenario(world):
        answer = await world.a.post(
            "/v1/files", files={"file": ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": 3}\nnot json\n')},
            data={"purpose": "fine-tune"},
        )  # fmt: skip
        job = await world.create(file=answer.json()["id"])
        job = await world.status(job["id"], "failed")
        assert job["error"]["code"] == "invalid_training_file" and job["error"]["param"] == "training_file"
        assert "Line 2" in job["error"]["message"] and "Line 3" in job["error"]["message"]
        assert world.engine.started() == []
        events = (await world.a.get(f"/v1/fine_tuning/jobs/{job['id']}/events")).json()["data"]
        assert events[0]["level"] == "error"

    in_world(tmp_path, scenario)


def test_a_validation_file_is_checked_and_handed_over(tmp_path):
    async def scenario(world):
        bad = await world.a.post(
            "/v1/files", files={"file": ("v.jsonl", b"{}\n")}, data={"purpose": "fine-tune"}
        )  # fmt: skip
        job = await world.create(validation_file=bad.json()["id"])
        job = await world.status(job["id"], "failed")
        assert job["error"]["code"] == "invalid_validation_file" and job["error"]["param"] == "validation_file"
        job = await world.create(validation_file=await world.upload(rows=3), training={"eval_every": 2})
        await world.started(job["id"])
        assert (world.engine.data_dir / "jobs" / job["id"] / "tokens" / "valid.safetensors").exists()

    in_world(tmp_path, scenario)


def test_over_length_rows_are_cut_with_a_warning(tmp_path):
    async def scenario(world):
        row = b'{"text": "%s"}\n' % (b"word " * 40)
        file = await world.a.post(
            "/v1/files", files={"file": ("t.jsonl", row * 3 + b'{"text": "short"}\n')}, data={"purpose": "fine-tune"}
        )
        job = await world.create(file=file.json()["id"], training={"max_length": 16})
        await world.started(job["id"])
        events = (await world.a.get(f"/v1/fine_tuning/jobs/{job['id']}/events")).json()["data"]
        warning = next(event for event in events if event["level"] == "warn")
        assert "3 of 4" in warning["message"] and "16 tokens" in warning["message"]

    in_world(tmp_path, scenario)


def test_publishing_makes_versions_and_pruning_takes_checkpoints(tmp_path):
    async def scenario(world):
        job_id, engine = await world.running(suffix="s"), world.engine
        engine.checkpoint(job_id, 1, b"one")
        engine.checkpoint(job_id, 2, b"two")
        path = f"jobs/{job_id}/checkpoints/step-00000002"
        digest = hashlib.sha256(b"two").hexdigest()
        engine.tell(job_id, "published", "Version published at step 2", step=2, path=path, digest=digest)
        engine.tell(job_id, "pruned", "Checkpoint of step 1 removed", step=1, path=path)

        async def pruned():
            checkpoints = (await world.a.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")).json()["data"]
            return [c["step_number"] for c in checkpoints] == [2]

        await world.until(pruned)
        model = f"ft:base:a:s:{job_id.removeprefix('ftjob-')}"
        assert (await world.a.get(f"/v1/models/{model}")).status_code == 200
        assert (await world.a.get(f"/v1/models/{model}:ckpt-step-2")).status_code == 200
        assert (await world.a.get(f"/v1/models/{model}:ckpt-step-1")).status_code == 404
        assert (await world.b.get(f"/v1/models/{model}")).status_code == 404
        adapter = (await world.a.get("/v1/adapters")).json()["data"][0]
        busy = await world.a.delete(f"/v1/adapters/{adapter['id']}")
        assert busy.status_code == 409
        engine.finish(job_id)
        await world.status(job_id, "succeeded")
        versions = (await world.a.get(f"/v1/adapters/{adapter['id']}/versions")).json()["data"]
        assert [v["version"] for v in versions] == [2, 1] and versions[1]["step_number"] == 2
        assert (await world.a.delete(f"/v1/adapters/{adapter['id']}")).json()["deleted"] is True

    in_world(tmp_path, scenario)


def test_a_failure_of_the_engine_is_the_jobs_error(tmp_path):
    async def failing(world):
        job_id = await world.running()
        event = world.engine.write(job_id, "failed", "The loss diverged", level="error")
        event.record["data"] = {"code": "loss_diverged", "message": "The loss diverged"}
        world.engine.push(event)
        job = await world.status(job_id, "failed")
        assert job["error"] == {"code": "loss_diverged", "message": "The loss diverged", "param": None}

    in_world(tmp_path, failing)
