"""The two tenants of the show and their keys: the readers, who only stream, and the shop, which trains."""

from __future__ import annotations

from coserve.server.demo.client import Client

READERS = "demo-readers"
SHOP = "demo-shop"
_KEY_NAME = "demo"
_ENDED = frozenset({"succeeded", "failed", "cancelled"})


async def make_key(admin: Client, tenant: str) -> str:
    """A new key of `tenant`, which is made if there is none; keys of earlier shows are revoked."""
    listed = await admin.get("/v1/organization/api_keys", limit=100)
    for key in listed["data"]:
        if key["tenant"] == tenant and key["name"] == _KEY_NAME:
            await admin.delete(f"/v1/organization/api_keys/{key['id']}")
    made = await admin.post("/v1/organization/api_keys", {"tenant": tenant, "name": _KEY_NAME})
    return str(made["key"])


async def cancel_leftovers(shop: Client) -> int:
    """Cancel what a show that was cut short left training; how many jobs that were."""
    jobs = (await shop.get("/v1/fine_tuning/jobs", limit=100))["data"]
    left = [job["id"] for job in jobs if job["status"] not in _ENDED]
    for job_id in left:
        await shop.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    return len(left)
