"""What DELETE of a model says: the adapter goes by any of its names, its parts do not go alone, the rest is unknown."""

from scripted_engine import in_world


def test_a_checkpoint_or_a_version_is_not_deleted_by_itself(tmp_path):
    async def scenario(world):
        job_id = await world.running(suffix="mine")
        world.engine.checkpoint(job_id, 3)
        digest = world.engine.finish(job_id, 9)
        model = (await world.status(job_id, "succeeded"))["fine_tuned_model"]
        parts = [f"{model}:ckpt-step-3", f"{model}@{digest[:12]}"]
        for part in parts:
            assert (await world.a.get(f"/v1/models/{part}")).status_code == 200
            refused = await world.a.delete(f"/v1/models/{part}")
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_value", "model")
            assert part in error["message"] and "delete its adapter" in error["message"]
            assert (await world.a.get(f"/v1/models/{part}")).status_code == 200
            foreign = await world.b.delete(f"/v1/models/{part}")
            assert foreign.status_code == 404
            unknown = await world.b.delete(f"/v1/models/{part[:-1]}x")
            assert foreign.text == unknown.text.replace(f"{part[:-1]}x", part), "another tenant's looks like none"
        assert (await world.a.delete(f"/v1/models/{model}")).json()["deleted"] is True
        assert (await world.a.delete(f"/v1/models/{parts[1]}")).status_code == 404

    in_world(tmp_path, scenario)
