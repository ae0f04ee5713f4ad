"""Decisions only: which tokens run in the next iteration. No torch, no I/O and no clock of its own."""

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.policy import Scheduler

__all__ = ["Scheduler", "SchedulerConfig"]
