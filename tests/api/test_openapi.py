"""The description of the API is one that tools can read: complete, without dangling references, and true of errors."""

from scripted_engine import in_world

from coserve.server.api.auth import route_table
from coserve.server.app import ROUTERS

BODIES = {
    "/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/fine_tuning/jobs": "training_file",
    "/v1/organization/api_keys": "tenant", "/tokenize": "prompt", "/detokenize": "tokens",
    "/v1/load_lora_adapter": "lora_path",
}  # fmt: skip


def references(value):
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_description_is_complete_and_true(tmp_path):
    async def scenario(world):
        description = (await world.a.get("/openapi.json")).json()
        for reference in references(description):
            found = description
            for part in reference.removeprefix("#/").split("/"):
                found = found[part]
        described = {(method.upper(), path) for path, one in description["paths"].items() for method in one}
        routes = {(entry.method, entry.path.replace(":path", "")) for entry in route_table(ROUTERS)}
        assert described == routes - {("GET", "/openapi.json")}
        for path, one in description["paths"].items():
            for operation in one.values():
                assert "422" not in operation["responses"], "a fault of a request is 400"
                error = operation["responses"]["default"]["content"]["application/json"]["schema"]
                assert set(error["properties"]["error"]["properties"]) == {"message", "type", "param", "code"}
            if path in BODIES:
                schema = one["post"]["requestBody"]["content"]["application/json"]["schema"]
                assert BODIES[path] in schema["properties"]
        job = description["paths"]["/v1/fine_tuning/jobs"]["post"]["requestBody"]["content"]["application/json"]
        adapter = job["schema"]["properties"]["adapter"]["anyOf"][0]
        assert adapter["properties"]["r"]["maximum"] == 1024

    in_world(tmp_path, scenario)
