"""A little world for the scheduler's tests: the simulator's device, with costs from a formula.

The device carries plans out and checks every one against rules of its own: blocks, order, unit borders. Its durations
come from a formula that the scheduler's model does not contain, times noise that the test chooses.
"""

from __future__ import annotations

from coserve.scheduler.simulation.cards import Card, Curve
from coserve.scheduler.simulation.device import Device
from coserve.scheduler.simulation.streams import Stream, Sweep
from coserve.scheduler.state import BackwardUnit, HeadUnit, Plan, TenantLimit, Unit

__all__ = ["Stream", "Sweep", "World"]

_FREE = Curve(((1, 0.0), (2, 0.0)))


class World(Device):
    """`seconds(plan)` is the true cost; an iteration takes up to `noise` times longer."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 16,
        max_running: int = 8,
        max_adapters: int = 4,
        itl: float = 0.25,
        noise: float = 0.1,
        seed: int = 0,
        speed: float = 1.0,
        limits: dict[str, TenantLimit] | None = None,
    ) -> None:
        card = Card("formula", 4, forward=_FREE, logits=_FREE, head=_FREE, backward=_FREE, overhead=0.001)
        super().__init__(card, blocks, block_size, max_running, max_adapters, itl, seed, limits=limits or {})
        self.noise, self.speed = noise, speed
        self.cancelled: list[Stream] = []
        self.dropped: list[Sweep] = []

    def forward_seconds(self, plan: Plan) -> float:
        rows = len(plan.decodes) + sum(p.tokens for p in plan.prefills) + sum(r.tokens for r in plan.rides)
        return 0.0 if rows == 0 else self.speed * (0.03 + 0.002 * (-(-rows // 16)) * 4 + 0.0004 * rows)

    def unit_seconds(self, unit: Unit) -> float:
        if isinstance(unit, HeadUnit):
            (steps,) = (s.head_steps for s in self.sweeps if s.number == unit.sweep_id)
            return self.speed * (0.001 + unit.steps / steps * (0.02 + 0.0008 * unit.rows))
        if isinstance(unit, BackwardUnit):
            return self.speed * (0.003 + 0.0003 * unit.tokens)
        return self.speed * (0.001 + 0.25 * unit.layers * (0.03 + 0.0009 * unit.tokens))

    def disturbed(self, seconds: float) -> float:
        return seconds * (1.0 + self.noise * self.random.random())
