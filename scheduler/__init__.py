"""Decisions only: which tokens run in the next iteration. No torch, no I/O and no clock of its own."""
