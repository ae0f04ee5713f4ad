"""The wheel, installed elsewhere: complete, importable only as `coserve`, and serving for a user who is not root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import httpx
import pytest
from tiny_models import save_tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a clean copy: a build folder left in the tree would leak into the wheel
    names = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (REPOSITORY / name).exists() or (REPOSITORY / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("coserve-*.whl"))


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"coserve"}
    modules = {
        f"coserve/{path.relative_to(REPOSITORY)}"
        for folder in ("server", "scheduler", "kernels")
        for path in (REPOSITORY / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert modules <= set(names), sorted(modules - set(names))
    assert "coserve/py.typed" in names
    data = list((REPOSITORY / "server").rglob("*.jsonl"))
    assert {f"coserve/{path.relative_to(REPOSITORY)}" for path in data} <= set(names)


def reachable_python() -> str | None:
    """An interpreter of this version that user `nobody` may run; the tests' own may lie in a private home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            subprocess.run([candidate, "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return None


def test_it_serves_as_another_user_with_a_long_data_directory(wheel):
    with tempfile.TemporaryDirectory(prefix="cs-", dir="/tmp") as name:
        root = Path(name)
        root.chmod(0o755)
        site = root / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        model = save_tiny_model(root / "model", "llama")
        for file in model.iterdir():
            file.chmod(0o644)
        home = root / "home"
        data = home / ("d" * (150 - len(str(home)) - 1))
        home.mkdir()
        user: dict = {}
        python: str | None = sys.executable
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            python = reachable_python()
            if python is None:
                pytest.skip("no Python of this version that an ordinary user may run")
        # What the wheel depends on, without the editable install of this repository.
        installed = [path for path in sys.path if path.endswith("site-packages")]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(site), *installed]),
        }  # fmt: skip
        command = [python, "-P", "-m", "coserve.server.cli", "serve", f"--model={model}",
                   f"--data-dir={data}", "--port=0", "--threads=1"]  # fmt: skip
        log = (root / "log").open("w+")
        server = subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, **user)
        try:
            deadline = time.monotonic() + 150
            while not (found := re.search(r"OPENAI_BASE_URL=(\S+)/v1", (root / "log").read_text())):
                assert server.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
                time.sleep(0.1)
            key = (data / "admin-key").read_text().strip()
            reply = httpx.post(
                f"{found[1]}/v1/completions", headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=100,
                json={"model": "model", "prompt": "hello", "max_tokens": 4},
            )  # fmt: skip
            assert reply.status_code == 200, reply.text
            assert len(str(data)) == 150
            assert "Permission" not in (root / "log").read_text()
        finally:
            server.terminate()
            assert server.wait(150) == 0, (root / "log").read_text()
            log.close()
