"""The weights of tenants by id; settings know them by name."""

from __future__ import annotations

from collections.abc import Iterable

from coserve.server.store.store import Store
from coserve.server.tenancy.terms import Terms


class TenantWeights:
    """Remembers names: a tenant keeps the one that it was made with."""

    def __init__(self, store: Store, terms: Terms) -> None:
        self._store, self._terms = store, terms
        self._known: dict[str, float] = {}

    async def of(self, tenants: Iterable[str]) -> dict[str, float]:
        """Of each of these."""
        wanted = set(tenants)
        for tenant in wanted - self._known.keys():
            found = await self._store.tenants.get(tenant)
            self._known[tenant] = self._terms.share(found.name if found is not None else tenant).weight
        return {tenant: self._known[tenant] for tenant in wanted}
