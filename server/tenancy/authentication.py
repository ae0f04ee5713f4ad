"""From a request's bearer key to its principal.

Keys are looked up by hash, in the database, on every request: one that is revoked stops working at once.
"""

from __future__ import annotations

import hashlib
import hmac

from coserve.server.store.keys import hash_key
from coserve.server.store.store import Store
from coserve.server.store.tenants import DEFAULT_TENANT, Tenant
from coserve.server.tenancy.principal import Principal

ADMIN_KEY_ID = "key_admin"
_LONGEST = 512  # characters of an Authorization header worth hashing


def tenant_salt(tenant: Tenant) -> str:
    """What separates a tenant's prefix cache from all others (hex); of no use to who does not know the secret."""
    return hmac.digest(tenant.salt_secret, b"prefix-cache", hashlib.sha256).hex()


class Authenticator:
    """Knows the admin key and the tenants' keys. `start` before use."""

    def __init__(self, store: Store, admin_key: str) -> None:
        self._store = store
        self._admin_hash = hash_key(admin_key)
        self._tenants: dict[str, Tenant] = {}  # they never change, and are never removed

    async def start(self) -> None:
        """Make the tenant `default` if need be: the admin key acts as it."""
        await self._store.tenants.ensure_default()

    async def authenticate(self, authorization: str | None) -> Principal | None:
        """The principal of an Authorization header's value; None if it is absent, malformed or unknown."""
        secret = bearer_key(authorization)
        if secret is None:
            return None
        if hmac.compare_digest(hash_key(secret), self._admin_hash):
            return await self._principal(DEFAULT_TENANT, ADMIN_KEY_ID, admin=True)
        key = await self._store.keys.authenticate(secret)
        return await self._principal(key.tenant, key.id, admin=False) if key is not None else None

    async def _principal(self, tenant_id: str, key_id: str, *, admin: bool) -> Principal | None:
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = await self._store.tenants.get(tenant_id)
            if tenant is None:
                return None
            self._tenants[tenant_id] = tenant
        return Principal(tenant.id, tenant.name, admin, key_id, tenant_salt(tenant))


def bearer_key(authorization: str | None) -> str | None:
    """The key of `Bearer <key>`; None for anything else."""
    if authorization is None or len(authorization) > _LONGEST:
        return None
    scheme, _, secret = authorization.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret or not secret.isascii() or not secret.isprintable():
        return None
    return secret
