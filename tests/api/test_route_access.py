"""Who may call what: the route table is complete, and nothing answers without a key but two paths."""

import pytest
from fastapi import APIRouter
from scripted_engine import in_world

from coserve.server.api.auth import PUBLIC_PATHS, Access, Caller, Public, route_table
from coserve.server.app import ROUTERS

ODD_PATHS = [
    "/",
    "//healthz",
    "/healthz/",
    "/HEALTHZ",
    "/healthz%00",
    "/v1",
    "/docs",
    "/redoc",
    "/nowhere",
]


def test_the_public_set_is_exactly_healthz_and_readyz():
    public = {entry.path for entry in route_table(ROUTERS) if entry.access is Access.PUBLIC}
    assert public == PUBLIC_PATHS == {"/healthz", "/readyz"}


def test_admin_routes():
    admin = {entry.path for entry in route_table(ROUTERS) if entry.access is Access.ADMIN}
    assert {"/metrics", "/v1/coserve/iterations"} <= admin
    alone = {"/metrics", "/v1/load_lora_adapter"}
    assert all(path.startswith(("/v1/organization/", "/v1/coserve/")) or path in alone for path in admin)


def test_a_route_without_an_access_class_does_not_start():
    undeclared, twice, hidden = APIRouter(), APIRouter(), APIRouter()

    @undeclared.get("/x")
    def x() -> None: ...

    @twice.get("/x", dependencies=[Public])
    def y(_: Caller) -> None: ...

    @hidden.get("/secret", dependencies=[Public])
    def z() -> None: ...

    for router in (undeclared, twice, hidden):
        with pytest.raises(TypeError, match=r"/x|/secret"):
            route_table([router])


def test_without_a_key_everything_else_is_401(tmp_path):
    async def scenario(world):
        table = [(entry.method, entry.path) for entry in route_table(ROUTERS) if entry.access is not Access.PUBLIC]
        assert len(table) > 20
        for method, path in [
            *table,
            *(("GET", path) for path in ODD_PATHS),
            ("POST", "/nowhere"),
            ("TRACE", "/v1/models"),
        ]:
            answer = await world.nobody.request(method, path.replace("{", "").replace("}", ""))
            assert answer.status_code == 401, (method, path, answer.status_code)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"]
        for path in PUBLIC_PATHS:
            assert (await world.nobody.get(path)).status_code == 200

    in_world(tmp_path, scenario)


def test_wrong_keys(tmp_path):
    async def scenario(world):
        good = world.a.headers["authorization"].removeprefix("Bearer ")
        for header in (
            f"Basic {good}",
            good,
            "Bearer",
            "Bearer ",
            f"Bearer {good[:-1]}",
            f"Bearer {good}x",
            "Bearer ü",
        ):
            headers = {"authorization": header.encode()}
            assert (await world.nobody.get("/v1/models", headers=headers)).status_code == 401, header
        twice = [(b"authorization", f"Bearer {good}".encode())] * 2
        assert (await world.nobody.get("/v1/models", headers=twice)).status_code == 401
        assert (await world.nobody.get("/v1/models", headers={"authorization": f"bearer  {good} "})).status_code == 200

    in_world(tmp_path, scenario)


def test_a_tenants_key_is_no_admin_key(tmp_path):
    async def scenario(world):
        for entry in route_table(ROUTERS):
            if entry.access is Access.ADMIN:
                answer = await world.a.request(entry.method, entry.path.replace("{", "").replace("}", ""))
                assert answer.status_code == 403, entry
                assert answer.json()["error"]["code"] == "insufficient_permissions"
        assert (await world.a.get("/openapi.json")).status_code == 200
        metrics = await world.admin.get("/metrics")
        assert metrics.status_code == 200
        assert "coserve_engine_up 1.0" in metrics.text

    in_world(tmp_path, scenario)
