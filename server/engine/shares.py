"""What each tenant may have of this engine, as the gateway last said: weights, and limits in blocks and pages."""

from __future__ import annotations

from collections.abc import Mapping

from coserve.scheduler.state import TenantLimit
from coserve.server.wire.messages import TenantShare

_WHOLE = TenantShare()


class Shares:
    """Every request and job brings its tenant's share with it, so a new engine needs nothing else."""

    def __init__(self, blocks: int, pages: int) -> None:
        self._blocks, self._pages = blocks, pages
        self._shares: dict[str, TenantShare] = {}
        self._limits: dict[str, TenantLimit] = {}

    def note(self, tenant: str, share: TenantShare) -> None:
        """From now on this is the tenant's share."""
        if self._shares.get(tenant, _WHOLE) == share:
            return
        self._shares[tenant] = share
        limit = TenantLimit(_part(share.kv, self._blocks), _part(share.adapters, self._pages))
        # A new table: whoever was given the old one keeps what it was told.
        self._limits = {**self._limits, tenant: limit}
        if limit == TenantLimit():
            del self._limits[tenant]

    def weight(self, tenant: str) -> float:
        return self._shares.get(tenant, _WHOLE).weight

    @property
    def limits(self) -> Mapping[str, TenantLimit]:
        """Of tenants whose share is not the whole."""
        return self._limits

    def cached_blocks(self, tenant: str) -> int | None:
        """The most K/V blocks that the prefix cache keeps for a tenant beyond those in use; None: no limit."""
        return _part(self._shares.get(tenant, _WHOLE).prefix, self._blocks)


def _part(share: float, whole: int) -> int | None:
    return None if share >= 1.0 else max(1, int(share * whole))
