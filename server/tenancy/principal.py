"""The one who makes a request, as every route sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    tenant: str  # id: owner of everything the request makes or sees
    tenant_name: str  # the organization shown in model ids
    admin: bool  # may use the admin routes; sees no other tenant's content for it
    key_id: str  # which key was used, for logs and idempotency; never the key
    salt: str  # of the tenant's prefix cache entries
