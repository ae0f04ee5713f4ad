"""A policy that takes all tenants for one: what fairness is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from coserve.scheduler.simulation.policies import Policy
from coserve.scheduler.state import Plan, SchedulerState


class OneTenant:
    """First come, first served: the policy inside never hears whose a request or a job is."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def plan(self, state: SchedulerState) -> Plan:
        return self._policy.plan(_blind(state))

    def observe(
        self, plan: Plan, state: SchedulerState, seconds: float, parts: Mapping[int | str, float] | None = None
    ) -> None:
        self._policy.observe(plan, _blind(state), seconds, parts)


def _blind(state: SchedulerState) -> SchedulerState:
    return replace(
        state,
        requests=tuple(replace(r, tenant="", weight=1.0) for r in state.requests),
        sweeps=tuple(
            replace(s, jobs=tuple(replace(j, tenant="", weight=1.0) for j in s.jobs)) for s in state.sweeps
        ),
    )  # fmt: skip
