"""Keys and iterations: the admin routes of this group."""

from scripted_engine import in_world

URL = "/v1/organization/api_keys"


def test_a_key_is_shown_once_works_and_can_be_revoked(tmp_path):
    async def scenario(world):
        made = (await world.admin.post(URL, json={"tenant": "acme", "name": "laptop"})).json()
        assert made["object"] == "organization.api_key" and made["tenant"] == "acme" and made["name"] == "laptop"
        assert made["key"].startswith("sk-cs-") and made["key"] not in made["redacted_value"]
        headers = {"authorization": f"Bearer {made['key']}"}
        assert (await world.nobody.get("/v1/files", headers=headers)).status_code == 200
        listed = (await world.admin.get(URL)).json()
        mine = next(key for key in listed["data"] if key["id"] == made["id"])
        assert mine == {name: value for name, value in made.items() if name != "key"}
        assert made["key"] not in (await world.admin.get(URL)).text
        gone = await world.admin.delete(f"{URL}/{made['id']}")
        assert gone.json() == {"id": made["id"], "object": "organization.api_key.deleted", "deleted": True}
        assert (await world.nobody.get("/v1/files", headers=headers)).status_code == 401
        assert (await world.admin.delete(f"{URL}/{made['id']}")).status_code == 404

    in_world(tmp_path, scenario)


def test_only_admins_may(tmp_path):
    async def scenario(world):
        for method, url in (("GET", URL), ("POST", URL), ("DELETE", f"{URL}/key_x"), ("GET", "/v1/coserve/iterations")):
            assert (await world.a.request(method, url)).status_code == 403
            assert (await world.nobody.request(method, url)).status_code == 401

    in_world(tmp_path, scenario)


def test_bodies_are_checked(tmp_path):
    async def scenario(world):
        for body in ({}, {"tenant": ""}, {"tenant": "../x"}, {"tenant": 3}, {"tenant": "a", "role": "admin"}):
            answer = await world.admin.post(URL, json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"], body

    in_world(tmp_path, scenario)


def test_the_admin_sees_no_tenants_content(tmp_path):
    async def scenario(world):
        file = await world.upload()
        assert (await world.admin.get(f"/v1/files/{file}")).status_code == 404
        assert (await world.admin.get("/v1/files")).json()["data"] == []

    in_world(tmp_path, scenario)


def test_iterations(tmp_path):
    async def scenario(world):
        answer = await world.admin.get("/v1/coserve/iterations", params={"limit": 1})
        assert answer.json() == {"object": "list", "data": [{"seq": 2}]}
        assert (await world.admin.get("/v1/coserve/iterations", params={"limit": 0})).status_code == 400
        await world.engine.stop()
        await world.until(lambda: world.services.engine.engine is None)
        assert (await world.admin.get("/v1/coserve/iterations")).status_code == 503

    in_world(tmp_path, scenario)
