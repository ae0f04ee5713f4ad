"""Percentiles, rates, the evidence in iteration records, and claims that fail when they should."""

import dataclasses
import io

import pytest
from rich.console import Console

from coserve.server.demo.meter import KINDS, Gaps, Rates, between, percentile, read_metrics
from coserve.server.demo.proof import IterationRecords, Shared
from coserve.server.demo.table import Picture, as_line, as_table
from coserve.server.demo.verdict import STALL_SECONDS, Measured, judge

PAGE = """# HELP coserve_step_tokens_total Tokens that iterations ran
# TYPE coserve_step_tokens_total counter
coserve_step_tokens_total{kind="decode"} 120.0
coserve_step_tokens_total{kind="train_backward"} 33.5
coserve_step_tokens_total{kind="something_new"} 7.0
coserve_step_tokens_created{kind="decode"} 1.7e+09
coserve_slo_itl_seconds 0.25
"""


def test_percentiles_are_values_that_occurred():
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert percentile([], 0.5) is None


def test_metrics_page_and_rates():
    first = read_metrics(PAGE, at=10.0)
    assert first.promise == 0.25
    assert first.tokens == {**dict.fromkeys(KINDS, 0.0), "decode": 120.0, "train_backward": 33.5}
    later = read_metrics(PAGE.replace("120.0", "160.0"), at=12.0)
    assert between(first, later) == {**dict.fromkeys(KINDS, 0.0), "decode": 20.0}
    restarted = read_metrics("", at=14.0)
    assert between(later, restarted) == dict.fromkeys(KINDS, 0.0)


def test_rates_look_at_the_window_only():
    rates = Rates(window=2.0)
    assert rates.by_kind() == dict.fromkeys(KINDS, 0.0)
    for second in range(10):
        rates.add(read_metrics(f'coserve_step_tokens_total{{kind="decode"}} {second**2}', at=float(second)))
    assert rates.by_kind()["decode"] == (81 - 49) / 2


def test_gaps_are_counted_by_when_they_ended():
    gaps = Gaps()
    for at, seconds in ((1.0, None), (1.5, 0.5), (4.5, 3.0), (4.6, 0.1)):
        gaps.add(at, seconds)
    assert gaps.since(0.0) == [0.1, 0.5, 3.0]
    assert gaps.since(1.5, 4.5) == [0.5]
    assert gaps.pieces == 4 and gaps.seconds_since_last(5.6) == pytest.approx(1.0)


def record(seq, *, decode=0, forward=0, backward=0, adapters=(), pid=7, started_at=0.0, measured=0.1):
    tokens = {"decode": decode, "prefill": 0, "train_forward": forward, "head": 0, "train_backward": backward}
    return {
        "seq": seq, "started_at": started_at, "tokens": tokens, "units": 0, "adapters": list(adapters),
        "predicted_s": 0.1, "measured_s": measured, "slo_budget_s": 0.2, "engine_pid": pid,
    }  # fmt: skip


def test_overlapping_pages_of_records_count_once():
    records = IterationRecords()
    first = [record(1, decode=3), record(2, decode=3, forward=8, adapters=("a", "b")), record(3, forward=8)]
    records.add(first)
    records.add(
        [*first[1:], record(4, decode=1, backward=2, measured=0.3), record(4, backward=2, pid=8, started_at=9.0)]
    )
    shared = records.summary(0.0, 5.0)
    assert shared == Shared(
        iterations=4, decode_and_forward=1, decode_and_backward=1, in_promise=2, with_streams=3,
        engine_pids=frozenset({7}),
    )  # fmt: skip
    assert records.summary(0.0, 10.0).engine_pids == {7, 8}


GOOD = Measured(
    job_status="succeeded", steps=40, pieces_during_training=900, longest_gap=0.9, stream_failures=(),
    shared=Shared(900, 300, 400, 890, 900, frozenset({7})), base_unchanged=True,
    exact_before=0, exact_after=33, held_out=40,
)  # fmt: skip


def test_a_good_run_holds():
    assert all(claim.held for claim in judge(GOOD, must_learn=True))
    learned_nothing = dataclasses.replace(GOOD, exact_after=0)
    assert all(claim.held for claim in judge(learned_nothing, must_learn=False))


@pytest.mark.parametrize(
    "change",
    [
        {"job_status": "failed"},
        {"pieces_during_training": 0},
        {"longest_gap": STALL_SECONDS},
        {"stream_failures": ("the stream was cut without a finish reason",)},
        {"shared": dataclasses.replace(GOOD.shared, decode_and_forward=0)},
        {"shared": dataclasses.replace(GOOD.shared, decode_and_backward=0)},
        {"shared": dataclasses.replace(GOOD.shared, engine_pids=frozenset({7, 8}))},
        {"shared": dataclasses.replace(GOOD.shared, engine_pids=frozenset())},
        {"base_unchanged": False},
        {"exact_after": 0},
        {"exact_after": 19},
        {"exact_before": 33},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_claim_can_fail_alone(change):
    claims = judge(dataclasses.replace(GOOD, **change), must_learn=True)
    assert [claim.held for claim in claims].count(False) == 1


def test_the_table_shows_what_is_not_known_as_a_dash():
    assert "loss" not in as_line(Picture(stage="alone"))
    line = as_line(Picture(stage="both", p50=0.0501, p99=0.2, promise=0.5, step=3, total_steps=40, loss=1.25, eta=61.2))
    assert "P50 50 ms P99 200 ms (promised 500 ms)" in line and "step 3 of 40 loss 1.250, 61 s left" in line
    console = Console(file=io.StringIO(), width=100)
    console.print(as_table(Picture(stage="alone", rates={"decode": 12.34})))
    shown = console.file.getvalue()
    assert "12.3 tokens/s" in shown and "P50 –, P99 –" in shown and shown.count("–") >= 5
