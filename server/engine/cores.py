"""How the engine's OpenMP threads wait for each other: spinning while the cores are theirs, sleeping when not.

An iteration passes a few hundred barriers. On free cores a thread that spins a tenth of a millisecond before it
sleeps saves a wake-up at nearly all of them (measured on two cores, Gemma 3 270M, decode steps of 4 / 16 rows: 36 /
52 ms spinning, 51 / 70 ms sleeping). With one other busy process beside it the spinning threads use up their share
of the cores and wait for it in turn (median 268 / 541 ms spinning, 94 / 95 ms sleeping).

So the waiting follows what the kernel says of the process: the time its threads were runnable and had no core
(Linux, /proc/self/task/*/schedstat). libgomp itself knows two lengths of spinning and takes the short one as long as
there are more OpenMP threads than cores (GOMP_SPINCOUNT in its manual). A team of threads that does nothing, kept
while the cores are crowded, brings that about. Results do not depend on it: no product is cut differently.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("coserve.engine")

_WINDOW_SECONDS = 0.1  # no look at the kernel's counters more often than this
_CROWDED = 0.15  # waiting for a core ÷ (waiting + running), over all threads of the process …
_CROWDED_LOOKS = 3  # … at so many looks in a row: an optimizer step on its side thread is over before
_FREE = 0.08  # the same, on average over a calm time; training beside idle cores has 0.03, one busy process makes 0.3
_CALM_SECONDS = 1.0  # free for so long before the threads spin again …
_MOST_CALM_SECONDS = 60.0  # … and up to so long where that soon went wrong
_BEHIND = 5  # niceness; a quarter of a core beside one of the loop's threads (sched(7): 1.25 a step)
_PARALLEL_ELEMENTS = 32768  # torch runs an elementwise operation of more elements than this a thread in parallel


@dataclass(frozen=True, slots=True)
class ThreadTime:
    """What the threads of this process have had of the cores so far, in seconds."""

    running: float
    waiting: float  # runnable, without a core

    def waiting_share(self, since: ThreadTime) -> float:
        """Waiting ÷ (waiting + running) between two readings, 0 where neither moved."""
        running, waiting = self.running - since.running, self.waiting - since.waiting
        return waiting / (running + waiting) if running + waiting > 0 else 0.0


class CoreSharing:
    """Call `adjust` once an iteration, from the thread that runs the model."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, thread_time: Callable[[], ThreadTime | None] | None = None
    ) -> None:
        self._clock, self._thread_time = clock, thread_time or read_thread_time
        self._team: _IdleTeam | None = None
        self._last_at, self._last = clock(), self._thread_time()
        self._crowded_looks = 0
        self._calm_at, self._calm = self._last_at, self._last  # where the calm time began that is being looked at
        self._calm_needed = _CALM_SECONDS
        self._spinning_since = -math.inf  # the last return to spinning
        # Where the kernel does not count, sleeping is the safe choice; one thread has nobody to wait for.
        self._watching = torch.get_num_threads() > 1 and self._last is not None
        if torch.get_num_threads() > 1 and self._last is None:
            self._sleep()

    @property
    def crowded(self) -> bool:
        """Whether the threads sleep at barriers."""
        return self._team is not None

    def adjust(self) -> None:
        now = self._clock()
        if not self._watching or now - self._last_at < _WINDOW_SECONDS:
            return
        read = self._thread_time()
        if read is None or self._last is None:
            return
        share = read.waiting_share(self._last)
        self._last_at, self._last = now, read
        if self._team is None:
            self._crowded_looks = self._crowded_looks + 1 if share > _CROWDED else 0
            if self._crowded_looks == _CROWDED_LOOKS:
                soon = now - self._spinning_since < 2 * self._calm_needed
                self._calm_needed = min(2 * self._calm_needed, _MOST_CALM_SECONDS) if soon else _CALM_SECONDS
                self._calm_at, self._calm = now, read
                self._sleep()
        elif now - self._calm_at >= self._calm_needed:
            if self._calm is not None and read.waiting_share(self._calm) <= _FREE:
                self._spin(now)
            self._calm_at, self._calm = now, read

    def close(self) -> None:
        """End the idle team; called once."""
        self._watching = False
        if self._team is not None:
            self._team.end()
            self._team = None

    def _sleep(self) -> None:
        self._team, self._crowded_looks = _IdleTeam(), 0
        log.info("the cores are shared: OpenMP threads sleep at barriers")

    def _spin(self, now: float) -> None:
        if self._team is not None:
            self._team.end()
        self._team, self._spinning_since = None, now
        log.info("the cores are free: OpenMP threads spin at barriers")


def read_thread_time() -> ThreadTime | None:
    """The process's sums, or None where the kernel does not say."""
    running = waiting = 0
    try:
        for task in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{task}/schedstat") as line:
                    fields = line.read().split()
            except (FileNotFoundError, ProcessLookupError):
                if not os.path.exists("/proc/self/schedstat"):
                    return None
                continue  # a thread that has just ended
            running += int(fields[0])
            waiting += int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return ThreadTime(running / 1e9, waiting / 1e9)


def work_alone() -> None:
    """Let torch use one thread in the calling thread, and start no OpenMP team for it. On a machine with a GPU
    nothing is done: it matters little there.

    For the threads beside the loop: their work is small, and a team of theirs would count among the OpenMP
    threads that decide how long the loop's own threads spin.
    """
    if sys.platform == "linux" and not torch.cuda.is_available():
        _set_team_size(1)


def work_behind() -> None:
    """As `work_alone`, and when the cores are all wanted the loop's threads go first: opening a job or an optimizer
    step makes no decode step wait. On Linux, where niceness is a thread's own."""
    work_alone()
    if sys.platform == "linux" and not torch.cuda.is_available():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND)


class _IdleTeam:
    """One more OpenMP team, larger than the machine, that sleeps until it is ended."""

    def __init__(self) -> None:
        self._over, ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="coserve-idle-team", daemon=True)
        self._thread.start()
        ready.wait()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        size = len(os.sched_getaffinity(0)) + 1
        _set_team_size(size)
        torch.zeros(2 * size * _PARALLEL_ELEMENTS).add_(1.0)  # a parallel region brings the team into being
        ready.set()
        self._over.wait()


def _set_team_size(threads: int) -> None:
    """Of the calling thread alone; `torch.set_num_threads` is for all. Asks the libraries that torch is linked with:
    MKL, where there is one, has a number of its own that goes before OpenMP's."""
    torch.get_num_threads()  # torch sets the thread's size at first use: let it do so before
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.omp_set_num_threads(threads)
    if hasattr(library, "MKL_Set_Num_Threads_Local"):
        library.MKL_Set_Num_Threads_Local(threads)
