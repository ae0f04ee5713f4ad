"""vLLM's two adapter routes: its bodies, its lines of text, and what a server of several tenants must refuse."""

import json
import os

import pytest
from scripted_engine import in_world

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def peft_folder(path, tensors=b"weights"):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (path / "adapter_model.safetensors").write_bytes(tensors)
    (path / "optimizer.pt").write_bytes(b"not to be copied")
    return str(path)


def test_loaded_replaced_in_place_and_unloaded(tmp_path):
    async def scenario(world):
        one, two = peft_folder(tmp_path / "one"), peft_folder(tmp_path / "two", b"other")
        loaded = await world.admin.post(LOAD, json={"lora_name": "mine", "lora_path": one})
        assert loaded.status_code == 200 and loaded.headers["content-type"].startswith("text/plain")
        assert loaded.text == "Success: LoRA adapter 'mine' added successfully."
        assert "mine" in [model["id"] for model in (await world.admin.get("/v1/models")).json()["data"]]
        again = await world.admin.post(LOAD, json={"lora_name": "mine", "lora_path": two})
        assert again.status_code == 400 and "has already been loaded" in again.json()["error"]["message"]
        body = {"lora_name": "mine", "lora_path": two, "load_inplace": True, "is_3d_lora_weight": False}
        assert (await world.admin.post(LOAD, json=body)).status_code == 200
        adapter = (await world.admin.get("/v1/adapters/mine")).json()
        assert adapter["version"] == 2 and adapter["rank"] == 4
        assert b"other" in (await world.admin.get("/v1/adapters/mine/download")).content
        assert sorted(os.listdir(tmp_path / "two"))[:2] == ["adapter_config.json", "adapter_model.safetensors"]
        foreign = await world.a.post(UNLOAD, json={"lora_name": "mine"})
        assert foreign.status_code == 404
        gone = await world.admin.post(UNLOAD, json={"lora_name": "mine", "lora_int_id": None})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        gone = await world.admin.post(UNLOAD, json={"lora_name": "mine"})
        error = gone.json()["error"]
        assert (gone.status_code, error["message"]) == (404, "The lora adapter 'mine' cannot be found.")
        assert list((world.services.data.root / "tmp").iterdir()) == []

    in_world(tmp_path, scenario)


def test_a_link_to_the_folder_and_to_its_files_is_followed(tmp_path):
    async def scenario(world):
        blobs = peft_folder(tmp_path / "blobs")
        (tmp_path / "snapshot").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "snapshot" / name).symlink_to(f"{blobs}/{name}")
        answer = await world.admin.post(LOAD, json={"lora_name": "x", "lora_path": str(tmp_path / "snapshot")})
        assert answer.status_code == 200, answer.text
        stored = [path for path in (world.services.data.root / "adapters").rglob("*") if path.is_file()]
        assert len(stored) == 2 and not any(path.is_symlink() for path in stored)

    in_world(tmp_path, scenario)


@pytest.mark.security
def test_what_is_refused(tmp_path):
    async def scenario(world):
        good, bad = peft_folder(tmp_path / "good"), peft_folder(tmp_path / "bad", b"bad tensors")
        (tmp_path / "pipes").mkdir()
        os.mkfifo(tmp_path / "pipes" / "adapter_config.json")
        big = peft_folder(tmp_path / "big", b"x" * 5000)
        tenant = await world.a.post(LOAD, json={"lora_name": "x", "lora_path": good})
        assert tenant.status_code == 403, "a tenant may not have files of the server read"
        for body, status, param in (
            ({"lora_path": good}, 400, "lora_name"), ({"lora_name": "x"}, 400, "lora_path"),
            ({"lora_name": "", "lora_path": good}, 400, "lora_name"),
            ({"lora_name": 5, "lora_path": good}, 400, "lora_name"),
            ({"lora_name": "base", "lora_path": good}, 400, "lora_name"),
            ({"lora_name": "../x", "lora_path": good}, 400, "lora_name"),
            ({"lora_name": "x", "lora_path": "org/adapter"}, 400, "lora_path"),
            ({"lora_name": "x", "lora_path": str(tmp_path / "none")}, 404, "lora_path"),
            ({"lora_name": "x", "lora_path": str(tmp_path / "pipes")}, 404, "lora_path"),
            ({"lora_name": "x", "lora_path": f"{good}/adapter_config.json"}, 404, "lora_path"),
            ({"lora_name": "x", "lora_path": "/" + "y" * 4000}, 404, "lora_path"),
            ({"lora_name": "x", "lora_path": big}, 400, "lora_path"),
            ({"lora_name": "x", "lora_path": bad}, 400, "x"),
            ({"lora_name": "x", "lora_path": good, "is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
            ({"lora_name": "x", "lora_path": good, "load_inplace": "yes"}, 400, "load_inplace"),
        ):  # fmt: skip
            answer = await world.admin.post(LOAD, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (body, answer.text)
        assert (await world.admin.get("/v1/adapters")).json()["data"] == []
        for path in ("tmp", "adapters"):
            assert not [one for one in (world.services.data.root / path).rglob("*") if one.is_file()]

    in_world(tmp_path, scenario, max_upload=4096)


def test_what_a_job_trained_is_not_unloaded(tmp_path):
    async def scenario(world):
        job_id = await world.running()
        world.engine.finish(job_id)
        await world.status(job_id, "succeeded")
        answer = await world.a.post(UNLOAD, json={"lora_name": job_id})
        assert answer.status_code == 400 and f"DELETE /v1/adapters/{job_id}" in answer.json()["error"]["message"]
        assert (await world.a.get(f"/v1/adapters/{job_id}")).status_code == 200

    in_world(tmp_path, scenario)
