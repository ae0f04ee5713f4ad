"""What every benchmark needs: the machine in words, workers that hold one peer each, and a report.

A worker is a process that answers JSON lines. All workers of a script are alive at once and all but the one being
measured are stopped by signal, so that systems can take turns within one run without disturbing each other. This
module imports neither torch nor the server.
"""

from __future__ import annotations

import argparse
import atexit
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"
PACKAGES = ("torch", "transformers", "peft")
# Projections that read the same rows and can be one product: everything up to their names is the key.
_JOINED = re.compile(r"(.*\.(?:self_attn|mlp))\.(?:[qkv]_proj|gate_proj|up_proj)\.weight")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the options that every script has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", type=_model, required=True, metavar="FOLDER", help="of safetensors; `tiny`: a random toy model"
    )
    made.add_argument("--threads", type=int, default=cores(), help="CPU threads of every system [all cores]")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return made


def _model(value: str) -> Path:
    """The folder; `tiny` makes the toy model of the tests, which is gone when the script ends."""
    if value != "tiny":
        return Path(value)
    folder = Path(tempfile.mkdtemp(prefix="coserve-bench-")) / "tiny"
    atexit.register(shutil.rmtree, folder.parent)
    make = "import sys, pathlib, tiny_models; tiny_models.save_tiny_model(pathlib.Path(sys.argv[1]), 'gemma3_text')"
    support = {"PYTHONPATH": str(PEERS.parents[1] / "tests" / "support")}
    subprocess.run(
        [sys.executable, "-c", make, str(folder)], env={**os.environ, **support}, check=True, stderr=subprocess.DEVNULL
    )
    return folder


def environment(threads: int) -> dict[str, str]:
    """For every process that computes: as many threads as are told, and the libraries' own defaults otherwise."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


# --------------------------------------------------------------------------- workers


class WorkerFailed(RuntimeError):
    """The peer cannot be measured here; the message is its last words."""


class Worker:
    """A peer in a process of its own, stopped except while it is asked. Context manager."""

    def __init__(self, script: str, *arguments: object, threads: int, python: Path | str = sys.executable) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the worker
        command = [str(python), str(PEERS / script), *map(str, arguments), f"--threads={threads}"]
        self._process = subprocess.Popen(
            command, env=environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, start_new_session=True,
        )  # fmt: skip
        self.facts: dict[str, Any] = {}
        try:
            self.facts = self._read()
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer; raises WorkerFailed."""
        self._signal(signal.SIGCONT)
        try:
            if self._process.stdin is None:
                raise WorkerFailed("the worker's input is closed")
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._read()
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self._process.wait()
            raise WorkerFailed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"it ended with {self._process.returncode} and said nothing"

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


# --------------------------------------------------------------------------- the model's weights


def weight_shapes(model: Path) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """([out, in] of every product of the decoder layers in order, [vocabulary, hidden] of the head), read off the
    headers of the safetensors files. Query, key and value count as one product, and gate and up: they read the same
    rows."""
    shapes: dict[str, tuple[int, int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(length))
        shapes |= {name: tuple(t["shape"]) for name, t in header.items() if len(t.get("shape", ())) == 2}
    joined: dict[str, list[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        if ".layers." in name:
            joined.setdefault(_JOINED.sub(r"\1.joined", name), []).append(shape)
    layers = [(sum(out for out, _ in parts), parts[0][1]) for parts in joined.values()]
    heads = [s for n, s in shapes.items() if "lm_head" in n] or [s for n, s in shapes.items() if "embed_tokens" in n]
    if not layers or not heads:
        raise SystemExit(f"{model}: no decoder weights in its safetensors files")
    return layers, heads[0]


# --------------------------------------------------------------------------- the report


def machine(threads: int, more: dict[str, str] | None = None) -> dict[str, str]:
    """Date, CPU, versions: what figures of another machine cannot be compared without."""
    facts = {
        "date": today(),
        "CPU": f"{_cpu_name()}, {cores()} cores, {threads} threads",
        "load before": load_average(),
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "absent"
    facts["commit"] = commit()
    return {**facts, **(more or {})}


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def load_average() -> str:
    """Of the last minute: how quiet the machine was."""
    return f"{os.getloadavg()[0]:.2f}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=PEERS, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@dataclass
class Report:
    """One table, the machine it is of, and every figure behind it."""

    title: str
    columns: Sequence[str]
    facts: dict[str, str]
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def emit(self, json_file: Path | None) -> None:
        """Print as markdown; all figures to `json_file`, if there is one."""
        print(f"### {self.title}\n")
        print(" · ".join(f"{name} {value}" for name, value in self.facts.items()) + "\n")
        print("| " + " | ".join(self.columns) + " |")
        print("|" + "---|" * len(self.columns))
        for row in self.rows:
            print("| " + " | ".join(_cell(value) for value in row) + " |")
        for note in self.notes:
            print(f"\n{note}")
        sys.stdout.flush()
        if json_file is not None:
            document = {"title": self.title, "machine": self.facts, "notes": self.notes, **self.figures}
            json_file.write_text(json.dumps(document, indent=1) + "\n")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"  … {text}", file=sys.stderr, flush=True)
