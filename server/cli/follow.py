"""Follows a finetuning job to its end: a progress bar in a terminal, plain lines elsewhere.

It only reads; leaving it does nothing to the job. A server that restarts meanwhile is waited for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import click

from coserve.server.cli.output import duration, plain
from coserve.server.cli.remote import Remote, RemoteError, path_part

ENDED = frozenset({"succeeded", "failed", "cancelled"})
_POLL_SECONDS = 1.0
_LINE_SECONDS = 2.0  # plain lines: no more than one of progress in so many seconds
_PATIENCE_SECONDS = 120.0  # for a server that does not answer

EXIT_OK, EXIT_FAILED, EXIT_DETACHED = 0, 1, 130


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    total: int
    loss: float | None
    tokens_per_second: float | None
    eta: float | None
    status: str

    @property
    def text(self) -> str:
        parts = [self.status]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.eta is not None and self.status == "running":
            parts.append(f"ETA {duration(self.eta)}")
        return "  ".join(parts)


class View(Protocol):
    def line(self, text: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...


def follow(remote: Remote, job_id: str) -> int:
    """Shows the job until it ends, or Ctrl-C; returns the exit code."""
    try:
        with _view() as view:
            job = _until_ended(remote, job_id, view)
    except KeyboardInterrupt:
        click.echo(f"\nleft; the job goes on. Follow it again with: coserve jobs follow {job_id}", err=True)
        return EXIT_DETACHED
    return report_end(job)


def report_end(job: dict[str, Any]) -> int:
    """Says how a job ended, and what to type next."""
    if job["status"] == "succeeded":
        click.echo(f"succeeded: {job['fine_tuned_model']} ({job.get('trained_tokens') or 0} tokens trained)")
        if sys.stdout.isatty():
            click.echo(f"ask it:    coserve chat --model {job['fine_tuned_model']}")
        return EXIT_OK
    reason = plain((job.get("error") or {}).get("message") or "")
    click.echo(f"{job['status']}: {job['id']}" + (f": {reason}" if reason else ""), err=True)
    return EXIT_FAILED


def progress_of(job: dict[str, Any]) -> Progress:
    values = job.get("progress") or {}
    status = str(job["status"])
    notes = [f"number {values['queue_position']}"] if status == "queued" and values.get("queue_position") else []
    if values.get("reason"):
        notes.append(plain(str(values["reason"])))
    if notes:
        status += f" ({', '.join(notes)})"
    return Progress(
        int(values.get("step") or 0), int(values.get("total_steps") or 0), values.get("loss"),
        values.get("tokens_per_second") or values.get("expected_tokens_per_second"), values.get("eta_seconds"), status,
    )  # fmt: skip


def _until_ended(remote: Remote, job_id: str, view: View) -> dict[str, Any]:
    seen: str | None = None
    silent_since: float | None = None
    while True:
        try:
            job = remote.get(f"/fine_tuning/jobs/{path_part(job_id)}")
            events = list(new_events(remote, job_id, seen))
            silent_since = None
        except RemoteError as error:
            if not error.passing:
                raise
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                view.line(f"waiting for the server: {error.message}")
            if now - silent_since > _PATIENCE_SECONDS:
                raise
            time.sleep(_POLL_SECONDS)
            continue
        for event in events:
            seen = event["id"]
            if event.get("type") != "metrics":
                mark = "" if event.get("level", "info") == "info" else f"{event['level']}: "
                view.line(mark + plain(event["message"]))
        view.progress(progress_of(job))
        if job["status"] in ENDED:
            return job
        time.sleep(_POLL_SECONDS)


def new_events(remote: Remote, job_id: str, seen: str | None) -> Iterator[dict[str, Any]]:
    """Events younger than `seen`, oldest first; the server lists them newest first."""
    found: list[dict[str, Any]] = []
    after = None
    while True:
        page = remote.get(f"/fine_tuning/jobs/{path_part(job_id)}/events", after=after, limit=100)
        for event in page["data"]:
            if event["id"] == seen:
                return reversed(found)
            found.append(event)
        if not page.get("has_more") or not page["data"]:
            return reversed(found)
        after = page["data"][-1]["id"]


class _Lines:
    """Plain lines, for pipes and logs."""

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None
        self._due = 0.0

    def line(self, text: str) -> None:
        click.echo(text)

    def progress(self, progress: Progress) -> None:
        state = (progress.step, progress.status)
        if state == self._last:
            return
        if self._last is not None and self._last[1] == progress.status and time.monotonic() < self._due:
            return
        self._last, self._due = state, time.monotonic() + _LINE_SECONDS
        click.echo(f"step {progress.step}/{progress.total}  {progress.text}" if progress.step else progress.text)


class _Bar:
    """A rich progress bar; event lines scroll above it."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)  # ids stay whole

    def progress(self, progress: Progress) -> None:
        self._bar.update(
            self._task, completed=progress.step, total=progress.total or None, description=progress.text
        )  # fmt: skip


@contextmanager
def _view() -> Iterator[View]:
    if not sys.stdout.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    with RichProgress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
    ) as bar:  # fmt: skip
        yield _Bar(bar)
