"""Making keys: for a tenant that may have to be made first."""

from __future__ import annotations

from coserve.server.store.errors import AlreadyExists
from coserve.server.store.keys import ApiKey
from coserve.server.store.store import Store
from coserve.server.store.tenants import Tenant


async def ensure_tenant(store: Store, name: str) -> Tenant:
    """The tenant called `name`, made if there is none. Raises ValueError for a bad name."""
    tenant = await store.tenants.by_name(name)
    if tenant is not None:
        return tenant
    try:
        return await store.tenants.create(name)
    except AlreadyExists:  # made by another request in between
        tenant = await store.tenants.by_name(name)
        if tenant is None:
            raise
        return tenant


async def issue_key(store: Store, tenant_name: str, key_name: str | None = None) -> tuple[Tenant, ApiKey, str]:
    """A new key of the tenant called `tenant_name`, and its secret, which is shown only now."""
    tenant = await ensure_tenant(store, tenant_name)
    key, secret = await store.keys.create(tenant.id, key_name)
    return tenant, key, secret
