"""Every example of the README and of the tutorial is run as it stands, against a whole server on a tiny model.

The examples take address, key and model from the environment, as they say themselves; nothing in them is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_server import LiveServer
from tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 120

FINETUNED = r"ft:tiny:default:[\w.-]*:\w{22}"
# (page, heading, number of the block under it) -> what it must print; None: anything
PRINTS = {
    ("README.md", "Chat", 1): r".*\n",
    ("README.md", "Chat", 2): r'.*"object":\s*"text_completion".*"completion_tokens":\s*[1-8]\b.*',
    ("README.md", "Finetune", 1): rf"succeeded {FINETUNED}\n.*\n",
    ("docs/getting-started.md", "2. Ask", 1): r"tiny\t.*\n.*",
    ("docs/getting-started.md", "3. Write a data set", 1): "",
    ("docs/getting-started.md", "4. Train and watch", 1): rf".*succeeded: {FINETUNED} \(\d+ tokens trained\)\n",
    (
        "docs/getting-started.md",
        "4. Train and watch",
        2,
    ): rf".*The job has successfully completed.*{FINETUNED}:ckpt-step-8.*",
    ("docs/getting-started.md", "5. Ask the adapter", 1): rf"tiny '.*'\n{FINETUNED} '.*'\n",
    (
        "docs/getting-started.md",
        "6. See that they shared iterations",
        1,
    ): r".*'train_forward': [1-9].*'train_backward': [1-9].*",
    ("docs/getting-started.md", "7. Take the adapter along", 1): "shout-adapter\n",
    ("docs/getting-started.md", "7. Take the adapter along", 2): r"'.*'\n",
    ("README.md", "Finetune", 2): rf"created ftjob-\w+\n.*succeeded: {FINETUNED} .*\tsucceeded\t4/4\t.*",
}


@dataclass(frozen=True)
class Example:
    page: str
    heading: str
    number: int  # under its heading
    language: str
    code: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.page, self.heading, self.number


def examples(page: str, languages: tuple[str, ...] = ("python", "bash")) -> list[Example]:
    """The page's blocks in these languages, in order."""
    found: list[Example] = []
    for section in re.split(r"^##+ ", (ROOT / page).read_text(), flags=re.MULTILINE):
        heading = section.partition("\n")[0].strip()
        blocks = [block for block in BLOCK.findall(section) if block[0] in languages]
        found += [Example(page, heading, i, *block) for i, block in enumerate(blocks, 1)]
    return found


PAGES = sorted({page for page, _, _ in PRINTS})
EXAMPLES = [example for page in PAGES for example in examples(page)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    with LiveServer(save_tiny_model(folder / "tiny"), folder / "data") as live:
        yield live


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """One folder for all examples of a page: later ones may use the files of earlier ones."""
    folders = {page: tmp_path_factory.mktemp("page") for page in PAGES}
    for folder in folders.values():
        (folder / "bin").mkdir()
        script = folder / "bin" / "coserve"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m coserve.server.cli "$@"\n')
        script.chmod(0o755)
    return folders


def test_every_example_has_an_expectation():
    assert {example.key for example in EXAMPLES} == set(PRINTS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.page}-{e.heading}-{e.number}")
def test_example(server, here, example):
    if "curl " in example.code and shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    folder = here[example.page]
    if example.language == "python":
        (folder / "example.py").write_text(example.code)
        command = [sys.executable, "-P", "example.py"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", example.code]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COSERVE_")},
        "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": server.key, "NO_PROXY": "127.0.0.1",
        "BASE_MODEL": str(server.data_dir.parent / "tiny"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(PRINTS[example.key], done.stdout, re.DOTALL), done.stdout + done.stderr


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [line for e in examples("README.md", ("sh",)) for line in e.code.splitlines()]
    assert commands and all(re.match(r"make (\w+)", line)[1] in targets for line in commands)


def test_the_measured_section_can_be_filled():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- measured:begin -->") == text.count("<!-- measured:end -->") == 1
    assert text.index("<!-- measured:begin -->") < text.index("<!-- measured:end -->")
