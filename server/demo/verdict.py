"""What the show claims, checked against what was measured: one line each, and whether it held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve.server.demo.proof import Shared

STALL_SECONDS = 10.0  # a reader who waits longer than this for the next piece calls it an interruption
WORTHWHILE = 0.5  # share of held-out orders that the real model's adapter must get exactly right


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about the run, and whether the measurements bear it out."""

    text: str
    held: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """All that the claims are judged by."""

    job_status: str
    steps: int
    pieces_during_training: int
    longest_gap: float
    stream_failures: Sequence[str]
    shared: Shared
    base_unchanged: bool
    exact_before: int
    exact_after: int
    held_out: int


def judge(measured: Measured, *, must_learn: bool) -> list[Claim]:
    """The claims. `must_learn`: the held-out answers must get better and good, not only be there."""
    shared, failures = measured.shared, measured.stream_failures
    flowed = not failures and measured.longest_gap < STALL_SECONDS and measured.pieces_during_training > 0
    reason = f" (first failure: {failures[0]})" if failures else ""
    pids = ", ".join(str(pid) for pid in sorted(shared.engine_pids)) or "none"
    claims = [
        Claim(
            f"tenant B's job: {measured.job_status} after {measured.steps} steps", measured.job_status == "succeeded"
        ),
        Claim(
            f"tenant A's streams flowed meanwhile: {measured.pieces_during_training} pieces, longest gap "
            f"{measured.longest_gap:.1f} s, {len(failures)} interrupted{reason}",
            flowed,
        ),
        Claim(
            f"of {shared.iterations} iterations, {shared.decode_and_forward} carried decode tokens and training tokens "
            "in one forward",
            shared.decode_and_forward > 0,
        ),
        Claim(
            f"and {shared.decode_and_backward} carried decode tokens and training's backward",
            shared.decode_and_backward > 0,
        ),
        Claim(f"one engine process did all of it, never restarted: {pids}", len(shared.engine_pids) == 1),
        Claim("the base model's own answers are the same as before, word for word", measured.base_unchanged),
    ]
    if must_learn:
        good = measured.exact_after > measured.exact_before
        good = good and measured.exact_after >= WORTHWHILE * measured.held_out
        claims.append(
            Claim(
                f"held-out orders answered exactly: {measured.exact_before} of {measured.held_out} before, "
                f"{measured.exact_after} of {measured.held_out} after",
                good,
            )
        )
    return claims
