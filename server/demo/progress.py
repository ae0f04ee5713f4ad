"""A progress bar on standard error: rich's in a terminal, one plain line every tenth without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Gives a function `(what happens now, share done)`; nothing is shown before its first call."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn(title),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=1.0, what="", visible=False)
            yield lambda what, share: bar.update(task, completed=share, what=what, visible=True)
        return
    shown = -1

    def line(what: str, share: float) -> None:
        nonlocal shown
        if int(share * 10) > shown:
            shown = int(share * 10)
            console.print(f"{title}: {shown * 10:3d} %  {what}", highlight=False)

    yield line
