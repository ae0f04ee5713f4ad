"""The picture of a comparison: it is written, and shows what the table and the ledgers say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from policy_plot import MOST_TENANTS, plot

FOUND = {
    "ours": {"requests inside both": 1.0, "tokens inside": 0.99, "training tokens/s": 170.0},
    "theirs": {"requests inside both": 0.5, "tokens inside": None, "training tokens/s": 180.0},
}
SERVICE = {
    "ours": {f"t{i}": 20.0 - i for i in range(MOST_TENANTS + 3)},
    "theirs": {"t0": 3.0, "t1": 40.0},
}


def widths(axes, series: int) -> list[float]:
    return [bar.get_width() for bar in axes.containers[series]]


def test_promises_training_and_service_have_a_panel_each(tmp_path: Path) -> None:
    file = tmp_path / "policies.png"
    kept, trained, served = plot(file, SERVICE, FOUND).axes
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 10_000
    assert [label.get_text() for label in kept.get_yticklabels()] == ["ours", "theirs"] and kept.yaxis_inverted()
    assert [c.get_label() for c in kept.containers] == ["requests inside both", "tokens inside"]
    assert [widths(kept, i) for i in (0, 1)] == [[100.0, 50.0], [99.0, 0.0]]
    assert widths(trained, 0) == [170.0, 180.0]
    assert [kept.get_xlabel(), trained.get_xlabel(), served.get_xlabel()] == [
        "kept their promises, %", "training tokens/s", "device seconds by tenant, ÷ weight",
    ]  # fmt: skip
    tenants = [c.get_label() for c in served.containers]
    assert tenants[:3] == ["t1", "t0", "t2"] and tenants[-1] == "others" and len(tenants) == MOST_TENANTS + 1
    assert widths(served, 0) == [19.0, 40.0] and widths(served, -1) == [11.0 + 10.0 + 9.0, 0.0]
    ends = [max(bar.get_x() + bar.get_width() for c in served.containers for bar in [c[row]]) for row in (0, 1)]
    assert ends == [sum(SERVICE["ours"].values()), sum(SERVICE["theirs"].values())], "bars stand beside each other"
