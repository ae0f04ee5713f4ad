"""Everything that a lent machine should tell, the most telling first, within the minutes there are.

Each table runs in a process of its own: one that fails, hangs or is out of memory takes no other with it. What it has
found is taken over about once a second, so the results file is whole whenever this process is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import say

from gpu_tables.table import Results, show

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"
ROOT = SCRIPT.parents[1]
ORDER = ("exactness", "decode", "training", "attention", "co-serving", "adapters")
_MINUTES = 25.0
_LEAST_SECONDS = 45.0  # with less than that a table is not begun
_SKIPPED = "skipped: toy size"
_TEST_SHARE = 0.25  # of the time, at most, is for the tests


def run_all(arguments: argparse.Namespace) -> None:
    """Exits with 1 if a test or a table failed or was cut short; a missed aim is no failure."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what runs
    minutes = _MINUTES if arguments.minutes is None else arguments.minutes
    deadline = time.monotonic() + 60 * minutes
    results = Results(arguments.json)
    runs = results.document.setdefault("runs", {})
    runs["tests"] = _tests(60 * minutes * _TEST_SHARE, arguments.smoke)
    results.save()
    for table in ORDER:
        left = deadline - time.monotonic()
        if left < (0 if arguments.smoke else _LEAST_SECONDS):
            runs[table] = {"ended": "not begun: the time was up"}
        else:
            runs[table] = _table(table, left, arguments, results)
        results.save()
    print("### What ran\n\n| part | how it ended | seconds |\n|---|---|---|")
    for name, run in runs.items():
        seconds = f"{run['seconds']:.0f}" if "seconds" in run else "–"
        print(f"| {name} | {run['ended']} | {seconds} |")
    failed = [name for name, run in runs.items() if run["ended"] not in ("finished", _SKIPPED)]
    sys.exit(1 if failed else 0)


def _tests(seconds: float, smoke: bool) -> dict[str, Any]:
    """The tests that need a GPU."""
    if smoke:
        return {"ended": _SKIPPED}
    marked = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in f.read_text()]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, marked)]
    say("the tests of `pytest -m gpu`")
    return _watched(command, seconds, lambda: None)


def _table(name: str, seconds: float, arguments: argparse.Namespace, results: Results) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="coserve-gpu-") as folder:
        part = Path(folder) / "table.json"
        command = [sys.executable, str(SCRIPT), "--table", name, "--json", str(part), f"--threads={arguments.threads}"]
        command += [f"--kernels={arguments.kernels}"]
        command += ["--smoke"] if arguments.smoke else []
        command += [f"--device={arguments.device}"] if arguments.device else []

        def take_over() -> None:
            if part.exists():
                results.document["tables"].update(json.loads(part.read_text())["tables"])
                results.save()

        say(f"{name}, at most {seconds:.0f} s")
        run = _watched(command, seconds, take_over)
    table = results.document["tables"].get(name)
    if table is not None and not table["complete"]:
        show(table)
    return run


def _watched(command: list[str], seconds: float, look: Any) -> dict[str, Any]:
    """Runs it for at most so long; `look` is called about once a second and at its end."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, process_group=0)
    ended = "finished"
    try:
        while process.poll() is None:
            if time.monotonic() > began + seconds:
                ended = "cut short: the time was up"
                break
            time.sleep(min(1.0, max(0.05, began + seconds - time.monotonic())))
            look()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: with the load process it may have started
        process.wait()
    look()
    if process.returncode and ended == "finished":
        ended = f"failed with {process.returncode}"
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
