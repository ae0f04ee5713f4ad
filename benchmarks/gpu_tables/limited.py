"""Tables one after another in this process, within the minutes there are."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import NoReturn

from gpu_tables.table import Results, show


class TimeUp(BaseException):
    """Raised wherever the run happens to be. No exception that an engine may contain."""


def limited(tables: Sequence[str], run: Callable[[str], None], minutes: float | None, results: Results) -> int:
    """Exit status: 1 where the time was up first; what is left unrun is then said. None: no limit."""

    def time_up(*_: object) -> NoReturn:
        raise TimeUp

    left = list(tables)
    handled = signal.signal(signal.SIGALRM, time_up)
    timed = signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0.0))
    try:
        while left:
            run(left[0])
            left.pop(0)
    except TimeUp:
        begun = results.document["tables"].get(left[0]) if left else None
        if begun is not None:
            left.pop(0)
            if not begun["complete"]:
                show(begun)
        if left:
            print(f"Not begun, because the time was up: {', '.join(left)}.")
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handled)
        signal.setitimer(signal.ITIMER_REAL, *timed)
    return 0
