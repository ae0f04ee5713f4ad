"""Adapters, their versions, and which of them a model string means; files, keys and the ledger beside them."""

import asyncio

import pytest

from coserve.server.store.adapters import NewVersion
from coserve.server.store.errors import AlreadyExists, UnknownCursor
from coserve.server.store.files import NewFile
from coserve.server.store.usage import Usage, UsageTotals


def version(character, **fields):
    return NewVersion(**{"digest": character * 64, "path": f"adapters/{character}", "rank": 8, "bytes": 100, **fields})


def publish(store, name, new, tenant=None):
    return asyncio.run(store.adapters.publish(tenant or store.a, name, new))


def resolve(store, model):
    found = asyncio.run(store.models.resolve(store.a, model))
    return found and found.digest[0]


def test_a_name_means_its_newest_version_and_a_digest_means_itself(store):
    adapter, first = publish(store, "mine", version("a"))
    same_adapter, second = publish(store, "mine", version("b"))
    assert (adapter.id, first.number, second.number) == (same_adapter.id, 1, 2)
    assert resolve(store, "mine") == resolve(store, adapter.id) == "b"
    assert resolve(store, f"mine@{'a' * 12}") == resolve(store, f"{adapter.id}@{'a' * 12}") == "a"
    for wrong in (
        f"mine@{'c' * 12}",
        f"mine@{'a' * 11}",
        f"mine@{'A' * 12}",
        "mine@",
        "Mine",
        "",
        "mine\0",
        "%",
        "mi%",
    ):
        assert resolve(store, wrong) is None, wrong


def test_the_newest_version_again_is_not_a_new_one_but_an_older_one_is(store):
    publish(store, "mine", version("a"))
    assert publish(store, "mine", version("a"))[1].number == 1
    publish(store, "mine", version("b"))
    assert publish(store, "mine", version("a"))[1].number == 3
    assert resolve(store, "mine") == "a"


def test_an_id_wins_over_a_name_that_looks_like_it(store):
    adapter, _ = publish(store, "mine", version("a"))
    publish(store, adapter.id, version("b"))
    assert resolve(store, adapter.id) == "a"


def test_a_deleted_adapter_is_gone_and_its_name_free(store):
    adapter, _ = publish(store, "mine", version("a"))
    publish(store, "mine", version("b"))
    gone = asyncio.run(store.adapters.delete(store.a, adapter.id))
    assert [one.digest[0] for one in gone] == ["b", "a"]
    assert asyncio.run(store.adapters.delete(store.a, adapter.id)) is None
    for model in ("mine", adapter.id, f"mine@{'a' * 12}"):
        assert resolve(store, model) is None
    assert not asyncio.run(store.adapters.digest_is_live("a" * 64))
    left = asyncio.run(store.adapters.all_deleted_versions_for_recovery())
    assert {one.digest[0] for one in left} == {"a", "b"}
    asyncio.run(store.adapters.files_removed(store.a, adapter.id))
    assert asyncio.run(store.adapters.all_deleted_versions_for_recovery()) == ()
    again, first = publish(store, "mine", version("c"))
    assert again.id != adapter.id and first.number == 1
    assert [one.digest[0] for one in asyncio.run(store.adapters.all_versions_for_recovery())] == ["c"]


def test_a_digest_that_another_tenant_has_too_stays_live(store):
    mine, _ = publish(store, "mine", version("a"))
    publish(store, "theirs", version("a"), tenant=store.b)
    asyncio.run(store.adapters.delete(store.a, mine.id))
    assert asyncio.run(store.adapters.digest_is_live("a" * 64))


def test_uploads_of_one_new_name_at_once_make_one_adapter(store):
    async def race():
        return await asyncio.gather(*(store.adapters.publish(store.a, "mine", version(c)) for c in "abcdef"))

    results = asyncio.run(race())
    assert len({adapter.id for adapter, _ in results}) == 1
    assert sorted(one.number for _, one in results) == [1, 2, 3, 4, 5, 6]


def test_an_adapter_without_versions_answers_nothing_yet(store):
    adapter = asyncio.run(store.adapters.create(store.a, "new", fine_tuned_model="ft:m:o::x"))
    assert resolve(store, "new") is None and resolve(store, "ft:m:o::x") is None
    with pytest.raises(AlreadyExists, match="'new'"):
        asyncio.run(store.adapters.create(store.a, "new"))
    asyncio.run(store.adapters.add_version(store.a, adapter.id, version("a", job_id=None, step=3)))
    assert resolve(store, "ft:m:o::x") == "a"
    assert asyncio.run(store.adapters.set_pinned(store.a, adapter.id, True)).pinned


def test_files_can_be_deleted_while_paging(store):
    made = [asyncio.run(store.files.create(store.a, NewFile(n, f"{n}", "fine-tune", "0" * 64))).id for n in range(4)]
    page = asyncio.run(store.files.list(store.a, limit=2))
    assert [file.id for file in page.items] == [made[3], made[2]] and page.has_more
    assert asyncio.run(store.files.delete(store.a, made[2]))
    assert not asyncio.run(store.files.delete(store.a, made[2]))
    page = asyncio.run(store.files.list(store.a, limit=2, after=made[2]))
    assert [file.id for file in page.items] == [made[1], made[0]] and not page.has_more
    assert asyncio.run(store.files.get(store.a, made[2])) is None
    ascending = asyncio.run(store.files.list(store.a, ascending=True, after=made[0], purpose="fine-tune"))
    assert [file.id for file in ascending.items] == [made[1], made[3]]
    with pytest.raises(UnknownCursor):
        asyncio.run(store.files.list(store.a, purpose="other", after=made[0]))
    assert asyncio.run(store.files.all_ids_for_recovery()) == {(store.a, made[n]) for n in (0, 1, 3)}


def test_the_ledger_counts_a_request_once(store, clock):
    usage = Usage("req-1", "m", prompt_tokens=10, cached_tokens=4, computed_tokens=6, completion_tokens=3)
    assert asyncio.run(store.usage.record(store.a, usage))
    assert not asyncio.run(store.usage.record(store.a, usage))
    clock.now += 10
    assert asyncio.run(store.usage.record(store.a, Usage("req-2", "m", 1, 0, 1, 1)))
    assert asyncio.run(store.usage.totals(store.a)) == UsageTotals(2, 11, 4, 4)
    assert asyncio.run(store.usage.totals(store.a, since=int(clock.now))) == UsageTotals(1, 1, 0, 1)
    assert asyncio.run(store.usage.totals(store.a, until=int(clock.now))) == UsageTotals(1, 10, 4, 3)


def test_keys_are_stored_as_hashes_only(store, tmp_path):
    key, secret = asyncio.run(store.keys.create(store.a, "ci"))
    assert secret.startswith("sk-cs-") and key.redacted.endswith(secret[-4:]) and secret[6:-4] not in key.redacted
    assert asyncio.run(store.keys.authenticate(secret)) == key
    for wrong in (secret[:-1], secret + "x", secret.swapcase(), "", "\ud800"):
        assert asyncio.run(store.keys.authenticate(wrong)) is None
    assert asyncio.run(store.keys.revoke(store.a, key.id))
    assert not asyncio.run(store.keys.revoke_for_admin(key.id))
    assert asyncio.run(store.keys.authenticate(secret)) is None
    assert asyncio.run(store.keys.list(store.a)).items == ()
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes(), file.name
