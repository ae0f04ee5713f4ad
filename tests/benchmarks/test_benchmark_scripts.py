"""Each benchmark runs at toy size and its figures hang together. What they say of speed is not looked at."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(900)  # of a run that hangs


def table(output: str) -> dict[str, list[str]]:
    """First cell -> the other cells of a row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1, "rows of different lengths"
    return {row[0]: row[1:] for row in rows[2:]}


def check_machine(output: str, figures: dict) -> None:
    for fact in ("date", "CPU", "load before", "load after", "torch", "transformers", "peft", "commit"):
        assert f"{fact} {figures['machine'][fact]}" in output


def test_serving(run_benchmark, tmp_path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no vllm here' >&2\nexit 1\n")
    broken.chmod(0o755)
    output, figures = run_benchmark(
        "serving.py", "--concurrency", 1, 3, "--prompt=12", "--new-tokens=4", "--rounds=2", f"--peer-python={broken}"
    )
    check_machine(output, figures)
    rows = table(output)
    measured = {"coserve, over HTTP", "transformers generate", "transformers continuous batching"}
    assert set(rows) == measured | {"bare products (floor)"}
    for name in measured:
        for count in ("1", "3"):
            rounds = figures["rounds"][name][count]
            assert len(rounds) == 2 and min(rounds) <= figures["median"][name][count] <= max(rounds)
    # No system is quicker than its own products.
    ours = figures["median"]["coserve, over HTTP"]
    assert all(ours[count] < figures["floor"][count] for count in ours)
    # A peer that is not there is named with its reason, and does not end the run.
    assert figures["absent"] == dict.fromkeys(("vLLM, over HTTP", "vLLM", "vLLM, LoRA enabled"), "no vllm here")
    assert "vLLM could not be measured: no vllm here" in output


def test_training(run_benchmark) -> None:
    output, figures = run_benchmark(
        "training.py", "--length=16", "--labels=4", "--batch=4", "--steps=2", "--rounds=1", "--rank=4"
    )
    check_machine(output, figures)
    rows = table(output)
    assert set(rows) == set(figures["median"]) and len(rows) == 4
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in figures["rounds"].values())
    # Four layers (q and o, k and v, the three of the MLP), the head 512 x 64; a quarter of the rows bears a label.
    layers, head = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64), 512 * 64
    assert figures["flops_per_token"] == {
        "coserve, save": 4 * layers + head, "coserve, recompute": 6 * layers + head,
        "PEFT": 4 * layers + 4 * head, "PEFT, gradient checkpointing": 6 * layers + 4 * head,
    }  # fmt: skip


def test_coserving(run_benchmark) -> None:
    output, figures = run_benchmark(
        "coserving.py", "--streams=2", "--prompt=8", "--new-tokens=12", "--length=16", "--labels=4", "--batch=2",
        "--steps=2", "--seconds=1", "--rounds=1", "--ladder", 1, "--slo-itl-ms=2000",
    )  # fmt: skip
    check_machine(output, figures)
    rows = table(output)
    assert len(rows) == 6
    phases = figures["phases"]
    both = phases["streams and job"]
    assert both["training_tokens_per_second"] and both["streams_tokens_per_second"][0] > 0
    assert figures["retention"] == pytest.approx(
        both["training_tokens_per_second"][0] / phases["job alone"]["training_tokens_per_second"][0]
    )
    # With a promise of two seconds everything is inside, so that there is a load, and a sum.
    assert both["slo_attainment"] == 1.0 and figures["sum"] == pytest.approx(figures["retention"] + figures["load"])
    assert figures["promise_s"] == pytest.approx(2.0)
    assert 0 < phases["streams alone"]["itl_p50_s"] <= phases["streams alone"]["itl_p99_s"]


SMALL_JOB = ("--length=16", "--labels=4", "--batch=2")


def test_promises(run_benchmark) -> None:
    output, figures = run_benchmark("promises.py", *SMALL_JOB, "--promises", 4, "--seconds=1.5", "--rounds=1")
    check_machine(output, figures)
    found = figures["promises"]["4"]
    assert list(table(output)) == ["4"] and found["promise_s"] == pytest.approx(4 * figures["decode_step_s"])
    both, alone, job = (found[name] for name in ("both", "streams alone", "job alone"))
    assert all(0 < part["inside"] <= 1 and part["p99_s"] > 0 and part["error"] > 0 for part in (both, alone))
    share = both["streams_tokens_per_second"][0] / alone["streams_tokens_per_second"][0]
    retention = both["training_tokens_per_second"][0] / job["training_tokens_per_second"][0]
    assert found["inference_share"] == pytest.approx(share)
    assert found["kept"] == pytest.approx(retention / (1 - share))


def test_burst(run_benchmark) -> None:
    output, figures = run_benchmark("burst.py", *SMALL_JOB, "--quiet=1.5", "--rounds=1")
    check_machine(output, figures)
    (burst,) = figures["bursts"]
    assert list(table(output)) == ["1"] and burst["iterations"] >= 64 and 0 <= burst["over"] <= burst["iterations"]
    assert burst["training_before"] > 0 and burst["back_s"] < 1.5


def test_tenants(run_benchmark) -> None:
    output, figures = run_benchmark(
        "tenants.py", *SMALL_JOB, "--seconds=2", "--rate=2", "--prompt=8", "--new-tokens=8"
    )  # fmt: skip
    check_machine(output, figures)
    phases = figures["phases"]
    assert list(table(output)) == list(phases) and len(phases) == 3
    first, more, jobs = phases.values()
    assert first["a_tokens_per_second"] == 0 < more["a_tokens_per_second"] and jobs["steps"] > 0
    # The same random times in every phase; those who were sent a request waited for its first token.
    assert first["requests"] == more["requests"] == jobs["requests"] == len(jobs["first_tokens_s"]) > 0
    assert figures["weights"]["3:1"]["a"] > 1.5 * figures["weights"]["3:1"]["b"] > 0


def test_activations(run_benchmark) -> None:
    output, figures = run_benchmark(
        "activations.py", "--length=64", "--labels=16", "--window=16", "--head-rows=4", "--rank=4"
    )
    check_machine(output, figures)
    found = figures["bytes_per_token"]
    assert set(table(output)) == set(found)
    assert all(0 < row["stored"] <= row["peak"] for row in found.values())
    plain, recompute, save = (found[n] for n in ("plain autograd (PEFT)", "coserve, recompute", "coserve, save"))
    # What "recompute" stores can be counted: a layer's input of 64, keys and values of 2 x 2 x 16, floats, 4 layers;
    # and the final state of the quarter of rows that bears a label. The sweep's own ids are a few bytes more.
    counted = 4 * (64 + 64) * 4 + 64 * 4 // 4
    assert counted <= recompute["stored"] <= 1.1 * counted
    assert recompute["stored"] < save["stored"] < plain["stored"]
    assert recompute["peak"] < plain["peak"] / 4
