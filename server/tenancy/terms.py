"""What a tenant may have: its weight, its promises and its shares, as the operator's settings say. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from coserve.server.wire.messages import EngineReady, TenantShare

MAX_TIMEOUT = 86_400.0  # a day
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Timeout = Annotated[float, Field(gt=0, le=MAX_TIMEOUT, allow_inf_nan=False)]  # seconds
Part = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

# OpenAI's tiers, and the scheduler's class of each.
TIERS: Mapping[str, str] = {
    "auto": "interactive", "default": "interactive", "priority": "interactive", "scale": "interactive", "flex": "batch",
}  # fmt: skip


class TenantTerms(BaseModel):
    """One tenant's entry of the setting `tenants`; what it leaves out is as for every tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)] = 1.0
    ttft_ms: Milliseconds | None = None
    itl_ms: Milliseconds | None = None
    batch_ttft_ms: Milliseconds | None = None
    batch_itl_ms: Milliseconds | None = None
    kv_share: Part | None = None
    prefix_share: Part | None = None
    adapter_share: Part | None = None
    request_timeout_seconds: Timeout | None = None


@dataclass(frozen=True, slots=True)
class Promise:
    """Seconds that a request is promised."""

    slo_class: str  # "interactive" | "batch"
    ttft: float
    itl: float


class TooTight(ValueError):
    """A request asked for more than its tenant is promised."""

    def __init__(self, field: str, asked: float, least: float) -> None:
        super().__init__(f"{asked:g} ms is asked for and {least:g} ms is promised at best")
        self.field, self.asked, self.least = field, asked, least


class TooLong(ValueError):
    """A request asked for more time than its tenant's requests have."""

    def __init__(self, most: float) -> None:
        super().__init__(f"at most {most:g} s")
        self.most = most


class Terms:
    """All tenants' terms. `parts`: of K/V blocks, prefix cache and adapter pages, of who has none of its own;
    `timeout`: seconds after which requests are ended, likewise."""

    def __init__(
        self, tenants: Mapping[str, TenantTerms], parts: tuple[float, float, float], timeout: float | None
    ) -> None:
        self._tenants, self._parts, self._timeout = dict(tenants), parts, timeout

    def share(self, tenant_name: str) -> TenantShare:
        own = self._tenants.get(tenant_name, TenantTerms())
        given = (own.kv_share, own.prefix_share, own.adapter_share)
        parts = [all_ if one is None else one for one, all_ in zip(given, self._parts, strict=True)]
        return TenantShare(own.weight, *parts)

    def timeout(self, tenant_name: str, asked: float | None) -> float | None:
        """Seconds after which a request of the tenant is ended that asks for so many; None: never. Raises TooLong."""
        own = self._tenants.get(tenant_name, TenantTerms()).request_timeout_seconds
        most = self._timeout if own is None else own
        if asked is None or most is None:
            return most if asked is None else asked
        if asked > most:
            raise TooLong(most)
        return asked

    def promise(
        self, tenant_name: str, engine: EngineReady, slo_class: str, ttft_ms: float | None, itl_ms: float | None
    ) -> Promise:
        """What a request of the tenant is promised that asks for these milliseconds. Raises TooTight."""
        own = self._tenants.get(tenant_name, TenantTerms())
        best = own.ttft_ms or 1e3 * engine.slo_ttft_seconds, own.itl_ms or 1e3 * engine.slo_itl_seconds
        if slo_class == "batch":
            # Unless the tenant's entry says so, no batch request is promised more than an interactive one.
            best = (
                own.batch_ttft_ms or max(1e3 * engine.slo_batch_ttft_seconds, best[0]),
                own.batch_itl_ms or max(1e3 * engine.slo_batch_itl_seconds, best[1]),
            )
        ttft = _within("ttft_ms", ttft_ms, best[0])
        return Promise(slo_class, ttft / 1e3, _within("itl_ms", itl_ms, best[1]) / 1e3)


def _within(field: str, asked: float | None, best: float) -> float:
    """`asked`, or the best there is. A part of a millisecond is forgiven: clients repeat rounded figures."""
    if asked is None:
        return best
    if asked < best - 1.0:
        raise TooTight(field, asked, best)
    return max(asked, best)
