"""The reference pages say what the code says: settings, routes, refused parameters, metrics, models, links, names."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import SMALL, tiny_config
from transformers import AutoConfig

from coserve.server.api.auth import route_table
from coserve.server.api.errors import _CODES as STATUS_CODES
from coserve.server.api.errors import ApiError
from coserve.server.api.generating import _FAILURES
from coserve.server.api.generation_params import refuse_unsupported
from coserve.server.app import ROUTERS
from coserve.server.cli.serve import command as serve
from coserve.server.config import Settings
from coserve.server.engine.attention import UnsupportedModel
from coserve.server.engine.probe import probe
from coserve.server.gateway.job_spec import ADAPTER_DEFAULTS, DEFAULT_LEARNING_RATE, TRAINING_DEFAULTS
from coserve.server.telemetry.catalogue import ENGINE_COUNTERS, ENGINE_GAUGES

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TOPS = ("server", "scheduler", "kernels", "tests", "benchmarks", "docs", "src", "requirements")


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """The rows of a table under a heading (the first, unless said), without its head; cells as written."""
    text = (DOCS / page).read_text()
    section = re.split(rf"^#+ {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)[1]
    found = re.findall(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert len(found) > number, f"no table under {heading!r} in {page}"
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found[number].splitlines()]


def code(cell: str) -> str:
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match, f"{cell!r} is no single piece of code"
    return match[1]


def test_the_settings_table_is_that_of_the_code():
    rows = table("configuration.md", "Configuration")
    options = {parameter.name for parameter in serve.params}
    for (name, option, variable, default, meaning), field in zip(rows, Settings.model_fields.items(), strict=True):
        expected = field[0]
        assert code(name) == expected and meaning
        assert option == (f"`--{expected.replace('_', '-')}`" if expected in options else "–"), expected
        assert code(variable) == f"COSERVE_{expected.upper()}"
        value = "–" if field[1].is_required() else "unset" if field[1].default is None else f"`{field[1].default}`"
        assert default == value, expected


def test_every_route_is_in_the_reference():
    rows = {(code(method), code(path)): access for method, path, access, _ in table("api.md", "Routes")}
    entries = {(e.method, e.path.replace(":path", "")): str(e.access) for e in route_table(ROUTERS)}
    assert rows == entries


@pytest.mark.parametrize("row", table("api.md", "Refused for now"), ids=lambda row: row[0])
def test_refused_parameters_are_refused(row):
    name, value = code(row[0]), json.loads(code(row[1]))
    with pytest.raises(ApiError) as caught:
        refuse_unsupported({name: value})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "unsupported_value", name)


@pytest.mark.parametrize("number, defaults", [(0, ADAPTER_DEFAULTS), (1, TRAINING_DEFAULTS)])
def test_the_fields_of_a_job_and_their_defaults(number, defaults):
    rows = table("api.md", "Jobs", number)
    assert [code(row[0]) for row in rows] == list(defaults)
    for name, default, _ in rows:
        if code(name) != "learning_rate":  # a product with the multiplier
            assert json.loads(code(default)) == defaults[code(name)], name
    assert f"{DEFAULT_LEARNING_RATE:.0e}".replace("e-0", "e-") in (DOCS / "api.md").read_text()


def test_every_failure_of_a_sequence_is_in_the_reference():
    named = {name for row in table("api.md", "Errors") for name in re.findall(r"`(\w+)`", row[1])}
    assert set(_FAILURES) <= named


def test_every_error_code_of_the_http_side_is_in_the_reference():
    named = {name for row in table("api.md", "Errors") for name in re.findall(r"`(\w+)`", row[1])}
    used = set(STATUS_CODES.values()) - {"not_found", "conflict"}  # the bare ones, where a route has none of its own
    for source in [*(ROOT / "server" / "api").glob("*.py"), *(ROOT / "server" / "gateway").glob("*_service.py")]:
        for call in ast.walk(ast.parse(source.read_text())):
            if isinstance(call, ast.Call):
                refusal = getattr(call.func, "id", None) in (
                    "Invalid",
                    "NotFound",
                    "Conflict",
                    "QueueFull",
                    "Unavailable",
                )
                given = [word.value for word in call.keywords if word.arg == "code"] + call.args[1:2] * refusal
                used |= {one.value for one in given if isinstance(one, ast.Constant) and one.value}
    assert len(used) > 30
    assert used <= named


def test_every_metric_of_the_engine_is_in_the_reference():
    named = {code(row[0]) for row in table("api.md", "Metrics")}
    assert set(ENGINE_COUNTERS) | set(ENGINE_GAUGES) <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_resolve(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            goal = page.parent / path if path else page
            assert goal.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(goal), f"{page.name} links to {target}"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([^`\n]+)`", prose):
        check_name(page.name, name)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE) if page.suffix == ".md" else []
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_name(page: str, name: str) -> None:
    """Paths below our folders exist, tests named `file::test` too, and dotted names of the package are modules."""
    path, _, test = name.partition("::")
    if re.fullmatch(rf"(?:{'|'.join(TOPS)})/[\w./-]*", path):
        assert (ROOT / path).exists(), f"{page} names {path}"
        if test:
            assert re.search(rf"^(?:async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE), f"{page}: {name}"
    elif name.startswith("coserve."):
        parts = name.split(".")[1:]
        found = any(
            (ROOT.joinpath(*parts[:end]).with_suffix(".py")).is_file() or (ROOT.joinpath(*parts[:end])).is_dir()
            for end in (len(parts), len(parts) - 1)
            if end
        )
        assert found, f"{page} names {name}"


def test_every_page_is_reached_from_the_index():
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("model_type", [code(row[0]) for row in table("models.md", "Served")])
def test_served_models_pass_the_probe(model_type):
    probe(tiny_config(model_type), dtype=torch.bfloat16)


@pytest.mark.parametrize("row", table("models.md", "Refused"), ids=lambda row: row[0])
def test_refused_models_are_refused_with_the_message(row):
    values = {**SMALL, **(json.loads(code(row[1])) if row[1] else {})}
    with pytest.raises(UnsupportedModel) as caught:
        probe(AutoConfig.for_model(code(row[0]), **values))
    assert row[2] in str(caught.value)
