"""Draws a comparison of policies: promises kept, training kept, and who had the device. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TENANTS = 9  # with a colour of their own, the most served first; the rest is one grey bar


def plot(file: Path, service: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Write a picture of three panels, a row a policy.

    Args:
        service: policy -> tenant -> device seconds divided by the tenant's weight.
        found: policy -> its row of the table (`simulate.row`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 0.7 * len(found) + 2), layout="constrained")
    kept, trained, served = figure.subplots(1, 3, sharey=True)
    names, places = list(found), range(len(found))
    for shift, what in ((-0.2, "requests inside both"), (0.2, "tokens inside")):
        kept.barh([p + shift for p in places], [100 * (found[n][what] or 0.0) for n in names], 0.38, label=what)
    kept.set_yticks(list(places), names)
    kept.set_xlabel("kept their promises, %")
    kept.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    trained.barh(places, [found[n]["training tokens/s"] for n in names], color="C2")
    trained.set_xlabel("training tokens/s")
    totals: dict[str, float] = {}
    for of_policy in service.values():
        for tenant, seconds in of_policy.items():
            totals[tenant] = totals.get(tenant, 0.0) + seconds
    own = sorted(totals, key=lambda tenant: (-totals[tenant], tenant))[:MOST_TENANTS]
    left = [0.0] * len(names)
    for number, tenant in enumerate([*own, None]):
        if tenant is None:
            widths = [sum(s for t, s in service[n].items() if t not in own) for n in names]
        else:
            widths = [service[n].get(tenant, 0.0) for n in names]
        if any(widths):
            served.barh(
                places, widths, left=left, color="0.7" if tenant is None else f"C{number}", label=tenant or "others"
            )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    served.set_xlabel("device seconds by tenant, ÷ weight")
    served.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
    kept.invert_yaxis()
    figure.savefig(file)
    return figure
