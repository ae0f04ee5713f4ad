"""Who a bearer key is: the admin, a tenant, or nobody."""

import asyncio
import stat

import pytest

from coserve.server.store.errors import StoreUnavailable
from coserve.server.store.store import Store
from coserve.server.tenancy.admin_key import load_admin_key
from coserve.server.tenancy.authentication import Authenticator
from coserve.server.tenancy.issuing import issue_key

ADMIN = "sk-cs-the-admin-key-of-this-test"


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "coserve.db")
    yield opened
    opened.close()


@pytest.fixture
def authenticator(store):
    made = Authenticator(store, ADMIN)
    asyncio.run(made.start())
    return made


def who(authenticator, header):
    return asyncio.run(authenticator.authenticate(header))


def test_the_admin_key_is_the_default_tenant_and_admin(authenticator):
    principal = who(authenticator, f"Bearer {ADMIN}")
    assert (principal.tenant, principal.tenant_name, principal.admin) == ("default", "default", True)


def test_a_tenants_key_is_that_tenant_and_no_admin_until_revoked(authenticator, store):
    tenant, key, secret = asyncio.run(issue_key(store, "acme", "laptop"))
    principal = who(authenticator, f"bearer  {secret}")
    assert (principal.tenant, principal.tenant_name, principal.admin, principal.key_id) == (
        tenant.id, "acme", False, key.id,
    )  # fmt: skip
    same_tenant, other_key, other_secret = asyncio.run(issue_key(store, "acme"))
    assert same_tenant.id == tenant.id
    asyncio.run(store.keys.revoke(tenant.id, key.id))
    assert who(authenticator, f"Bearer {secret}") is None
    assert who(authenticator, f"Bearer {other_secret}").key_id == other_key.id


@pytest.mark.security
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", ADMIN, f"Basic {ADMIN}", f"Bearer {ADMIN}x", f"Bearer {ADMIN[:-1]}",
     f"Bearer {ADMIN.upper()}", f"Bearer {ADMIN} {ADMIN}", "Bearer \0", "Bearer é", "Bearer " + "x" * 100_000,
     "Bearer \ud800", f"Bearer\t{ADMIN}", "Bearer ' OR 1=1 --"],
)  # fmt: skip
def test_everything_else_is_nobody(authenticator, header):
    assert who(authenticator, header) is None


def test_salts_differ_between_tenants_and_stay_over_restarts(tmp_path):
    salts = []
    for _ in range(2):
        store = Store(tmp_path / "coserve.db")
        authenticator = Authenticator(store, ADMIN)
        asyncio.run(authenticator.start())
        keys = [asyncio.run(issue_key(store, name))[2] for name in ("a", "b")]
        salts.append([who(authenticator, f"Bearer {key}").salt for key in [*keys, ADMIN]])
        store.close()
    assert salts[0] == salts[1] and len(set(salts[0])) == 3
    assert all(len(salt) == 64 for salt in salts[0])


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "-a", ".a", "a" * 65, "a:b", "a\n"])
def test_bad_tenant_names(store, name):
    with pytest.raises(ValueError, match="tenant name"):
        asyncio.run(issue_key(store, name))


def test_issuing_at_once_makes_one_tenant(store):
    async def race():
        return await asyncio.gather(*(issue_key(store, "acme") for _ in range(5)))

    results = asyncio.run(race())
    assert len({tenant.id for tenant, _, _ in results}) == 1 and len({secret for _, _, secret in results}) == 5


def test_the_admin_key_is_made_once_for_its_owner_only(tmp_path):
    path = tmp_path / "admin-key"
    secret = load_admin_key(path)
    assert secret.startswith("sk-cs-") and load_admin_key(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert load_admin_key(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_admin_key(path, given=ADMIN) == ADMIN and path.read_text().strip() == secret


def test_admin_keys_that_are_none(tmp_path):
    for given in ("", "short", "x" * 15, "with spaces in it, long", "é" * 20):
        with pytest.raises(ValueError, match="at least 16"):
            load_admin_key(tmp_path / "k", given=given)
    (tmp_path / "empty").touch()
    with pytest.raises(StoreUnavailable, match="start again"):
        load_admin_key(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(StoreUnavailable):
        load_admin_key(tmp_path / "link")
