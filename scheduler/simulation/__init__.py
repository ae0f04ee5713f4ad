"""The scheduler under a virtual clock: simulated devices, workloads, faults and rival policies."""

from coserve.scheduler.simulation.cards import Card, Curve, Noise, cards
from coserve.scheduler.simulation.ledger import Ledger, Setup
from coserve.scheduler.simulation.policies import policies
from coserve.scheduler.simulation.report import Report, report, retention
from coserve.scheduler.simulation.run import simulate

__all__ = [
    "Card", "Curve", "Ledger", "Noise", "Report", "Setup", "cards", "policies", "report", "retention", "simulate",
]  # fmt: skip
