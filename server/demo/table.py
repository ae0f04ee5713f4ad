"""The live table: one picture of the server at a time, as a rich table in a terminal, as plain lines without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

_PLAIN_SECONDS = 10.0
_NAMES = {
    "decode": "decode (tenant A's streams)",
    "prefill": "prefill",
    "train_forward": "training forward (tenant B)",
    "head": "training head",
    "train_backward": "training backward",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """What there is to see now. Times are seconds; None is shown as a dash."""

    stage: str
    rates: Mapping[str, float] = field(default_factory=dict)  # tokens a second by kind
    p50: float | None = None
    p99: float | None = None
    promise: float | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    eta: float | None = None
    finished_streams: int = 0
    failed_streams: int = 0
    words: str = ""


class LiveTable:
    """Shows pictures; use it in `with`. Without a terminal it prints one line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._shown_at: float | None = None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, picture: Picture, now: float) -> None:
        if self._live is not None:
            self._live.update(as_table(picture))
        elif self._shown_at is None or now - self._shown_at >= _PLAIN_SECONDS:
            self._shown_at = now
            self._console.print(as_line(picture), highlight=False, soft_wrap=True, markup=False)


def as_table(picture: Picture) -> Table:
    table = Table(title=picture.stage, title_justify="left", show_header=False, expand=False)
    table.add_column(justify="left", min_width=30)
    table.add_column(justify="right", min_width=32)
    for kind, name in _NAMES.items():
        table.add_row(name, f"{picture.rates.get(kind, 0.0):.1f} tokens/s")
    table.add_section()
    promise = f", promised {_milliseconds(picture.promise)}" if picture.promise else ""
    table.add_row(
        "between two tokens of a stream", f"P50 {_milliseconds(picture.p50)}, P99 {_milliseconds(picture.p99)}{promise}"
    )
    table.add_row("streams finished / failed", f"{picture.finished_streams} / {picture.failed_streams}")
    table.add_row("a reader sees", f"… {picture.words}", style="dim")
    table.add_section()
    table.add_row("optimizer step", _steps(picture))
    table.add_row("training loss", "–" if picture.loss is None else f"{picture.loss:.3f}")
    table.add_row("time left", "–" if picture.eta is None else f"{picture.eta:.0f} s")
    return table


def as_line(picture: Picture) -> str:
    rates = " ".join(f"{kind} {picture.rates.get(kind, 0.0):.1f}" for kind in _NAMES)
    line = f"{picture.stage}: tokens/s {rates} | P50 {_milliseconds(picture.p50)} P99 {_milliseconds(picture.p99)}"
    if picture.promise:
        line += f" (promised {_milliseconds(picture.promise)})"
    if picture.step is not None:
        loss = "–" if picture.loss is None else f"{picture.loss:.3f}"
        eta = "" if picture.eta is None else f", {picture.eta:.0f} s left"
        line += f" | step {_steps(picture)} loss {loss}{eta}"
    return line


def _steps(picture: Picture) -> str:
    return "–" if picture.step is None else f"{picture.step} of {picture.total_steps or '?'}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"
