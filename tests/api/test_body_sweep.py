"""Every field of every JSON body with every kind of wrong value: an answer that names the field, never a 5xx.

The rows are checked against the route table, so a new route that takes a JSON body needs one here.
"""

import json

from scripted_engine import in_world

from coserve.server.api.auth import Access, route_table
from coserve.server.api.checkpoint_permissions import CreatePermissions
from coserve.server.api.fine_tuning_models import (
    AdapterOptions,
    CreateJob,
    Hyperparameters,
    Method,
    Supervised,
    TrainingOptions,
)
from coserve.server.api.keys import CreateKey
from coserve.server.api.lora_aliases import LoadLora, UnloadLora
from coserve.server.api.tokenize import DetokenizeRequest, TokenizeRequest
from coserve.server.app import ROUTERS

WRONG = [
    None, True, 0, -1, 2**64, 10**400, 0.5, 1e308, "", "1", "a\nb", "é😀", "../x", "x" * 5000, [], [None], [10**400],
    ["a", ""], [[1]], {}, {"a": 1}, {"": ""}, [{}],
]  # fmt: skip
JOBS = "/v1/fine_tuning/jobs"
PERMISSIONS = "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"
JOB = {"model": "base", "training_file": "FILE"}
# route, body that is right, where in it the model's fields stand, the model
SWEPT = [
    (JOBS, JOB, (), CreateJob),
    (JOBS, JOB, ("hyperparameters",), Hyperparameters),
    (JOBS, JOB, ("method",), Method),
    (JOBS, JOB, ("method", "supervised"), Supervised),
    (JOBS, JOB, ("method", "supervised", "hyperparameters"), Hyperparameters),
    (JOBS, JOB, ("adapter",), AdapterOptions),
    (JOBS, JOB, ("training",), TrainingOptions),
    ("/tokenize", {"prompt": "a"}, (), TokenizeRequest),
    ("/detokenize", {"tokens": [5]}, (), DetokenizeRequest),
    ("/v1/organization/api_keys", {"tenant": "t"}, (), CreateKey),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "FOLDER", "load_inplace": True}, (), LoadLora),
    ("/v1/unload_lora_adapter", {"lora_name": "x"}, (), UnloadLora),
    (PERMISSIONS, {"project_ids": ["b"]}, (), CreatePermissions),
]  # fmt: skip
ELSEWHERE = {"/v1/chat/completions", "/v1/completions"}  # see test_generation_fuzz
NOT_JSON = {"/v1/files", "/v1/adapters"}  # multipart
NO_BODY = ("/cancel", "/pause", "/resume", "/pin", "/unpin")


def test_every_route_with_a_json_body_is_swept():
    posts = {e.path.replace(":path", "") for e in route_table(ROUTERS) if e.method == "POST"}
    assert {path for path, *_ in SWEPT} == {path for path in posts - ELSEWHERE - NOT_JSON if not path.endswith(NO_BODY)}
    assert all(e.access is not Access.PUBLIC for e in route_table(ROUTERS) if e.method == "POST")


def test_wrong_values_are_named(tmp_path):
    async def scenario(world):
        job_id = await world.running(suffix="s")
        world.engine.finish(job_id)
        model = (await world.status(job_id, "succeeded"))["fine_tuned_model"]
        file = await world.upload(world.admin)
        folder = str(tmp_path / "adapter")
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4}')
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        refused = 0
        for route, right, place, fields in SWEPT:
            client = world.a if route == PERMISSIONS else world.admin
            path = route.replace("{fine_tuned_model_checkpoint}", model)
            for name in [*fields.model_fields, "no such field"]:
                for value in WRONG:
                    body = json.loads(json.dumps(right).replace("FOLDER", folder).replace("FILE", file))
                    inner = body
                    for part in place:
                        inner = inner.setdefault(part, {"type": "supervised"} if part == "method" else {})
                    inner[name] = value
                    answer = await client.post(
                        path, content=json.dumps(body), headers={"content-type": "application/json"}
                    )
                    told = (route, name, str(value)[:60], answer.text[:300])
                    assert answer.status_code in (200, 400, 404), told
                    if answer.status_code == 200:
                        continue
                    refused += 1
                    error = answer.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}, told
                    if answer.status_code == 400 and not (route == "/tokenize" and error["param"] == "prompt"):
                        assert (error["param"] or "").startswith(".".join((*place, name))), told  # or inside of it
                    assert "Input should" not in error["message"] and len(error["message"]) < 700, told
        assert refused > 1000

    in_world(tmp_path, scenario, max_jobs_queued_tenant=100_000)
