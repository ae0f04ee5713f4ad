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
        self._copies: dict[str, int] = {}  # tenant -> pages that its jobs' training copies hold
        self._limits: dict[str, TenantLimit] = {}

    def note(self, tenant: str, share: TenantShare) -> None:
        """From now on this is the tenant's share."""
        if self._shares.get(tenant, _WHOLE) != share:
            self._shares[tenant] = share
            self._limit(tenant)

    def hold(self, tenant: str, pages: int) -> None:
        """So many pages more (or fewer) are training copies of the tenant's jobs; its requests have the rest."""
        self._copies[tenant] = self._copies.get(tenant, 0) + pages
        if not self._copies[tenant]:
            del self._copies[tenant]
        self._limit(tenant)

    def _limit(self, tenant: str) -> None:
        blocks, pages = _part(self._shares.get(tenant, _WHOLE).kv, self._blocks), self.adapter_pages(tenant)
        if pages is not None:
            pages = max(0, pages - self._copies.get(tenant, 0))
        # A new table: whoever was given the old one keeps what it was told.
        self._limits = {**self._limits, tenant: TenantLimit(blocks, pages)}
        if blocks is None and pages is None:
            del self._limits[tenant]

    def weight(self, tenant: str) -> float:
        return self._shares.get(tenant, _WHOLE).weight

    def adapter_pages(self, tenant: str) -> int | None:
        """The most pages of the adapter pool that a tenant's requests and jobs use together; None: no limit."""
        return _part(self._shares.get(tenant, _WHOLE).adapters, self._pages)

    @property
    def limits(self) -> Mapping[str, TenantLimit]:
        """What requests may hold, of tenants whose share is not the whole."""
        return self._limits

    def cached_blocks(self, tenant: str) -> int | None:
        """The most K/V blocks that the prefix cache keeps for a tenant beyond those in use; None: no limit."""
        return _part(self._shares.get(tenant, _WHOLE).prefix, self._blocks)


def _part(share: float, whole: int) -> int | None:
    return None if share >= 1.0 else max(1, int(share * whole))
