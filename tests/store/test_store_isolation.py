"""No tenant's thing exists for another one: every repository method, found by looking, not by a list kept by hand."""

import asyncio
import inspect
import sqlite3

import pytest

from coserve.server.store.adapters import NewVersion
from coserve.server.store.checkpoints import NewCheckpoint
from coserve.server.store.database import Database
from coserve.server.store.files import NewFile
from coserve.server.store.job_events import NewEvent
from coserve.server.store.job_progress import JobEffects
from coserve.server.store.jobs import JobChange, NewJob
from coserve.server.store.submissions import Submission
from coserve.server.store.usage import Usage, UsageTotals

TENANTLESS = {
    "keys.authenticate",  # the key says who it is
    "adapters.digest_is_live",  # the engine keys what it loaded by digest alone; answers yes or no
    "tenants.create", "tenants.ensure_default", "tenants.get", "tenants.by_name",  # tenants own themselves
}  # fmt: skip
VERSION = NewVersion("a" * 64, "adapters/x", 8, 10)


def methods(store):
    for repository_name, repository in vars(store).items():
        if isinstance(repository, Database | str):
            continue
        for name, method in inspect.getmembers(repository, inspect.iscoroutinefunction):
            if not name.startswith("_"):
                yield f"{repository_name}.{name}", method


def test_every_method_requires_a_tenant_or_says_in_its_name_why_not(store):
    seen = 0
    for name, method in methods(store):
        first = next(iter(inspect.signature(method).parameters), None)
        if first == "tenant":
            parameter = inspect.signature(method).parameters["tenant"]
            assert parameter.default is inspect.Parameter.empty, name
        else:
            assert name in TENANTLESS or name.endswith(("_for_recovery", "_for_admin")), name
        seen += 1
    assert seen > 30


def populate(store, tenant):
    """One of everything for `tenant`; what names it."""

    async def fill():
        key, _ = await store.keys.create(tenant, "k")
        file = await store.files.create(tenant, NewFile(1, "f.jsonl", "fine-tune", "0" * 64))
        submission = Submission("h", "key_1", key="k")
        new = NewJob("m", file.id, 1, {}, {}, {}, {}, fine_tuned_model="ft:m:o::j", metadata={"a": "b"})
        job, _ = await store.jobs.create(tenant, new, events=[NewEvent("secret")], submission=submission)
        await store.jobs.change(tenant, job.id, JobChange(status="queued"))
        await store.jobs.change(tenant, job.id, JobChange(status="running"))
        checkpoint = NewCheckpoint(1, "ft:m:o::j:ckpt-step-1", "b" * 64, "jobs/j/1")
        await store.progress.apply(tenant, job.id, 1, JobEffects(checkpoint=checkpoint))
        adapter, _ = await store.adapters.publish(tenant, "mine", VERSION)
        (permission,) = await store.permissions.grant(tenant, "ft:m:o::j:ckpt-step-1", ["someone"])
        await store.usage.record(tenant, Usage("req-1", "m", 1, 0, 1, 1))
        return {
            "key": key.id, "file": file.id, "job": job.id, "adapter": adapter.id, "model": "ft:m:o::j:ckpt-step-1",
            "permission": permission.id,
        }  # fmt: skip

    return asyncio.run(fill())


CALLS = {
    "keys.get": ("key",), "keys.revoke": ("key",),
    "files.get": ("file",), "files.set_status": ("file", "error"), "files.delete": ("file",),
    "jobs.get": ("job",), "jobs.change": ("job", JobChange(status="cancelled", events=[NewEvent("x")])),
    "progress.apply": ("job", 2, JobEffects(change=JobChange(status="failed"))),
    "events.list": ("job",), "events.since": ("job",), "checkpoints.list": ("job",),
    "adapters.get": ("adapter",), "adapters.set_pinned": ("adapter", True), "adapters.versions": ("adapter",),
    "adapters.newest_version": ("adapter",), "adapters.delete": ("adapter",),
    "permissions.list": ("model",), "permissions.grant": ("model", ["beta"]),
    "permissions.revoke": ("permission", "ft:m:o::j:ckpt-step-1"),
    "adapters.add_version": ("adapter", NewVersion("c" * 64, "p", 8, 1)), "adapters.files_removed": ("adapter",),
}  # fmt: skip
NAMED = {
    "adapters.by_name": "mine", "adapters.by_fine_tuned_model": "ft:m:o::j", "usage.get": "req-1",
    "models.resolve": "mine",
}  # fmt: skip
OWN_ONLY = {  # lists and counts, and what makes something new for the tenant that is named
    "keys.list", "files.list", "jobs.list", "adapters.list", "checkpoints.all_of_tenant", "usage.totals", "jobs.count",
    "keys.create", "files.create", "jobs.create", "adapters.create", "adapters.publish", "usage.record",
}  # fmt: skip


def everything(store):
    """All rows of all tables."""

    def dump(connection):
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: [tuple(row) for row in connection.execute(f"SELECT * FROM {table}")] for table in sorted(tables)}

    return asyncio.run(store._database.read(dump))


@pytest.mark.security
def test_a_foreign_id_is_an_unknown_id_and_changes_nothing(store):
    ids = populate(store, store.a)
    called, before = set(), everything(store)
    for name, method in methods(store):
        if name in CALLS:
            kind, *rest = CALLS[name]
            foreign = asyncio.run(method(store.b, ids[kind], *rest))
            unknown = asyncio.run(method(store.b, "nothing-like-it", *rest))
        elif name == "jobs.submitted":
            foreign = asyncio.run(method(store.b, Submission("h", "key_1", key="k")))
            unknown = asyncio.run(method(store.b, Submission("h", "key_1", key="other")))
            assert asyncio.run(method(store.a, Submission("h", "key_1", key="k"))).id == ids["job"]
        elif name in NAMED:
            foreign = asyncio.run(method(store.b, NAMED[name]))
            unknown = asyncio.run(method(store.b, "nothing-like-it"))
        else:
            continue
        assert foreign == unknown and foreign in (None, False), name
        called.add(name)
    assert everything(store) == before
    covered = called | OWN_ONLY | TENANTLESS
    missing = {name for name, _ in methods(store)} - covered
    assert all(name.endswith(("_for_recovery", "_for_admin")) for name in missing), missing


@pytest.mark.security
def test_model_strings_of_another_tenant_do_not_resolve(store):
    ids = populate(store, store.a)
    strings = ["mine", ids["adapter"], "ft:m:o::j:ckpt-step-1", f"mine@{'a' * 12}", f"{ids['adapter']}@{'a' * 12}"]
    for model in strings:
        assert asyncio.run(store.models.resolve(store.a, model)) is not None, model
        assert asyncio.run(store.models.resolve(store.b, model)) is None, model


@pytest.mark.security
def test_a_grant_is_for_the_project_that_it_names(store):
    populate(store, store.a)
    model = "ft:m:o::j:ckpt-step-1"
    found = asyncio.run(store.models.resolve(store.b, model, project="someone"))
    assert found is not None and found.tenant == store.a
    assert asyncio.run(store.models.resolve(store.b, model, project="beta")) is None
    assert asyncio.run(store.models.resolve(store.b, model)) is None
    assert asyncio.run(store.models.resolve(store.b, "mine", project="someone")) is None


def test_lists_and_sums_hold_only_the_tenants_own(store):
    populate(store, store.a)
    for listing in (store.keys.list, store.files.list, store.jobs.list, store.adapters.list):
        assert len(asyncio.run(listing(store.a)).items) == 1
        assert asyncio.run(listing(store.b)).items == ()
    assert asyncio.run(store.checkpoints.all_of_tenant(store.b)) == ()
    assert len(asyncio.run(store.checkpoints.all_of_tenant(store.a))) == 1
    assert asyncio.run(store.usage.totals(store.b)) == UsageTotals(0, 0, 0, 0)
    assert asyncio.run(store.jobs.count(store.b, ["running"])) == 0


def test_two_tenants_have_adapters_of_one_name(store):
    asyncio.run(store.adapters.publish(store.a, "mine", NewVersion("1" * 64, "pa", 8, 1)))
    asyncio.run(store.adapters.publish(store.b, "mine", NewVersion("2" * 64, "pb", 8, 1)))
    assert asyncio.run(store.models.resolve(store.a, "mine")).path == "pa"
    assert asyncio.run(store.models.resolve(store.b, "mine")).path == "pb"


def test_nothing_belongs_to_a_tenant_that_does_not_exist(store):
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        asyncio.run(store.files.create("tenant-nobody", NewFile(1, "f", "fine-tune", "0" * 64)))
