"""The GPU's tables at toy size on a CPU: they run end to end without the HTTP side's packages, and hang together.

What they say of speed is not looked at. What they say of exactness is: in float32 it must hold here too.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # of a run that hangs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLES = ("decode", "adapters", "training", "co-serving", "exactness", "attention")
# What a machine with a GPU may lack; for every process of the run, as if it were not installed.
WITHOUT = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {"fastapi", "starlette", "uvicorn", "pydantic", "redis", "zmq", "httpx"}
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
"""


def gpu(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--device=cpu", "--threads=1", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=880,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(standard output, tables by name) of one run of all of them."""
    folder = tmp_path_factory.mktemp("gpu")
    done = gpu(folder, "--json", folder / "figures.json", "--table", *TABLES)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, json.loads((folder / "figures.json").read_text())["tables"]


@pytest.fixture(autouse=True)
def the_scripts_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def columns(table: dict[str, Any], name: str) -> list[Any]:
    return [row[table["columns"].index(name)] for row in table["rows"]]


def test_every_table_is_printed_whole_with_its_aims(smoke: tuple[str, dict[str, Any]]) -> None:
    output, tables = smoke
    assert list(tables) == list(TABLES) and all(table["complete"] for table in tables.values())
    for table in tables.values():
        assert f"### {table['title']}" in output and "Toy size: these figures say" in output
        assert 0 <= table["seconds"] < 880 and f"It took {table['seconds']:.0f} s." in output
        assert {"date", "torch", "transformers", "peft", "triton", "commit"} <= set(table["machine"])
        for aim in table["aims"]:
            said = {True: "met", False: "missed", None: "not measured"}[aim["met"]]
            assert any(line.startswith(f"- {aim['what']}:") and line.endswith(said) for line in output.splitlines())
    assert "failed" not in output and "could not be measured" not in output


def test_decode_stands_over_its_floor_and_beside_its_peer(smoke: tuple[str, dict[str, Any]]) -> None:
    from gpu_tables.geometry import TOY

    table = smoke[1]["decode"]
    for batch, context, step, floor, over, peer, _, ahead in table["rows"]:
        assert abs(context - 64) <= 8
        read = 4 * (TOY.layer_parameters + TOY.head_parameters) + batch * context * TOY.layers * 2 * 2 * 16 * 4
        assert floor == pytest.approx(1e3 * read / table["copy_bytes_per_second"], rel=0.02)
        assert over == pytest.approx(step / floor) and ahead == pytest.approx(peer / step) and over > 1


def test_steps_are_taken_apart(smoke: tuple[str, dict[str, Any]]) -> None:
    output, tables = smoke
    parts = tables["decode"]["parts"]["3"]
    seconds = [seconds for _, seconds, _ in parts["top"]]
    assert seconds == sorted(seconds, reverse=True) and 0 < sum(seconds) <= parts["busy"]
    assert f"A step at batch 3: the device is busy {1e3 * parts['busy']:.3g} of" in output
    for policy in ("save", "recompute"):
        assert tables["training"][f"coserve, {policy}, 32"]["parts"]["launches"] > 100


def test_adapters_reserve_what_their_pages_take(smoke: tuple[str, dict[str, Any]]) -> None:
    table = smoke[1]["adapters"]
    named = dict(zip(zip(*(columns(table, n) for n in ("adapters", "requests choose")), strict=True),
                     table["rows"], strict=True))  # fmt: skip
    page = 8 * 64 * 4

    def pages(rank: int) -> int:
        widths = 2 * [(64, 64)] + 2 * [(64, 32)] + 2 * [(64, 128)] + [(128, 64)]
        least = 2 * sum(-(-rank * width // (8 * 64)) for pair in widths for width in pair)
        return -(-least // 4) * 4  # whole blocks: the keys and values of two layers are four pages

    reserved = table["columns"].index("MiB reserved")
    assert named["0, off", "base"][reserved] == 0 and named["0, off again", "base"][2] == 0
    four = 4 * pages(16) * page / 2**20
    assert named["on, unused", "base"][reserved] == pytest.approx(four)
    mixed = four + (pages(32) + pages(8) + pages(64)) * page / 2**20  # the one of rank 16 is there already
    assert named["4, ranks mixed", "distinct"][reserved] == pytest.approx(mixed)
    assert [named["4, rank 16", spread][2] for spread in ("distinct",)] == [4]
    floors = table["columns"].index("floor ms")
    assert named["4, rank 16", "distinct"][floors] > named["1, rank 16", "identical"][floors]


def test_training_counts_the_flop_of_its_method(smoke: tuple[str, dict[str, Any]]) -> None:
    table = smoke[1]["training"]
    assert columns(table, "system")[:4] == ["coserve, save", "coserve, recompute", "PEFT", "PEFT, checkpointing"]
    assert columns(table, "length") == [32] * 4 + [64] * 4
    for row in table["rows"]:
        rate, flop, share = row[2], 1e9 * row[4], row[5]
        assert rate > 0 and share == pytest.approx(rate * flop / table["product_flop_per_second"])
    assert table["rows"][0][4] == table["rows"][2][4] < table["rows"][1][4] == table["rows"][3][4]
    assert columns(table, "÷ PEFT")[2] == 1.0


def test_coserving_adds_what_training_keeps_and_requests_get(smoke: tuple[str, dict[str, Any]]) -> None:
    table = smoke[1]["co-serving"]
    alone = table["training_alone_tokens_per_second"]
    rules = table["shares"]["0.5"]
    assert list(rules) == ["inference only", "coserve", "SLO-limited temporal sharing", "temporal sharing, 64"]
    assert rules["inference only"]["training"] == 0.0 and rules["coserve"]["training"] > 0.0 < alone
    for row, (rule, figures) in zip(table["rows"][1:], rules.items(), strict=True):
        assert row[2] == rule and figures["rate"] == pytest.approx(0.5 * table["best_rate_alone"])
        assert figures["requests"] and not figures["failed"]
        retention, gain = row[-2:]
        assert retention == pytest.approx(figures["training"] / alone) and gain == pytest.approx(retention + 0.5)


def test_gradients_and_tokens_are_exact(smoke: tuple[str, dict[str, Any]]) -> None:
    table = smoke[1]["exactness"]
    errors = {(dtype, what): float(error) for dtype, what, error, _ in table["rows"]}
    for what in ("gradients, save", "gradients, recompute", "greedy tokens, base", "greedy tokens, adapter"):
        assert errors["float32", what] <= 1e-4
    aims = {aim["what"]: (aim["bound"], aim["met"]) for aim in table["aims"]}
    for what in ("gradients, save", "gradients, recompute", "greedy tokens, base", "greedy tokens, adapter"):
        assert aims[f"float32, {what}"] == (1e-4, True) and aims[f"bfloat16, {what}"][0] == 1e-2
    assert aims["bfloat16, greedy tokens, base"][1] and aims["bfloat16, greedy tokens, adapter"][1]
    # Nothing but rounding in bfloat16: the same as any program's.
    assert 1e-3 < errors["bfloat16", "gradients, save"] < 1.5 * errors["bfloat16", "gradients, PEFT in this dtype"]


def test_attention_is_the_same_as_torchs_own(smoke: tuple[str, dict[str, Any]]) -> None:
    output, tables = smoke
    table = tables["attention"]
    assert [row[:2] for row in table["rows"]] == [
        [rows, what] for rows in ("two of 24", "8 after 16, 20") for what in ("forward", "forward and backward")
    ] + [["3 of 40", "decode"]]
    for row in table["rows"][:4]:
        assert float(row[8]) < 1e-5 and row[7] == pytest.approx(row[6] / row[2])
    # A row sees the prefix, itself and what is between: 8 rows 16 and 1 to 8 keys, 20 rows 1 to 20.
    flop = 2 * 2 * 4 * 16 * (8 * 16 + 36 + 210)
    assert table["rows"][2][3] == pytest.approx(flop / table["rows"][2][2] / 1e9)
    assert "8 after 16, 20: torch ran scaled_dot_product_attention" in output


def test_a_time_that_is_up_is_said_and_keeps_what_there_is(tmp_path: Path) -> None:
    done = gpu(tmp_path, "--all", "--minutes=0.03", "--json", tmp_path / "figures.json")
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert done.returncode == 1, "a cut run is no success"
    assert runs["tests"]["ended"] == "skipped: toy size"
    assert runs["exactness"]["ended"] == "cut short: the time was up"
    assert runs["adapters"]["ended"] == "not begun: the time was up"
    assert "| adapters | not begun: the time was up | – |" in done.stdout


def test_tables_of_one_process_end_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_tables.limited import limited
    from gpu_tables.table import Results, Table

    results = Results(None)

    def run(name: str) -> None:
        table = Table(name, f"The table {name}", ["a"], {"date": "today"}, results)
        table.row(1)
        if name == "long":
            time.sleep(60)
        table.finish()

    assert limited(["short"], run, None, results) == 0
    assert "It took 0 s." in capsys.readouterr().out
    assert limited(["short", "long", "unrun", "other"], run, 0.02, results) == 1
    output = capsys.readouterr().out
    assert output.count("### The table long") == 1 and "| 1 |" in output and output.count("ended before") == 1
    assert output.endswith("Not begun, because the time was up: unrun, other.\n")


def test_rows_are_in_the_file_before_the_table_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_tables.table import Results, Table, show

    file = tmp_path / "figures.json"
    table = Table("decode", "A table", ["a", "b"], {"date": "today"}, Results(file))
    table.row(1, 2.5)
    table.aim("ratio", 2.5, 2.0)
    table.aim("gain", None, 1.2, at_least=True)
    found = json.loads(file.read_text())["tables"]["decode"]
    assert found["rows"] == [[1, 2.5]] and not found["complete"] and [a["met"] for a in found["aims"]] == [False, None]
    show(found)
    output = capsys.readouterr().out
    assert "| 1 | 2.50 |" in output and "- ratio: 2.5, aim ≤ 2: missed" in output
    assert "- gain: –, aim ≥ 1.2: not measured" in output and "ended before this table was complete" in output


def test_what_a_token_of_the_large_model_costs() -> None:
    import torch
    from gpu_tables.geometry import LLAMA_8B

    # 8.03 billion parameters are the products, the embedding as large as the head, and the norms.
    products = LLAMA_8B.layer_parameters + LLAMA_8B.head_parameters
    assert products + LLAMA_8B.head_parameters + 65 * 4096 == 8_030_261_248
    assert LLAMA_8B.weight_bytes(torch.bfloat16) == 2 * products
    assert LLAMA_8B.kv_bytes(torch.bfloat16) == 128 * 1024
    assert LLAMA_8B.lora_parameters(16) == 41_943_040
    short, long = (LLAMA_8B.training_flop(length, 16) for length in (2048, 8192))
    assert 4 * products < short < 1.1 * 4 * products < long < 1.3 * 4 * products
    again = LLAMA_8B.training_flop(2048, 16, forwards=2) - short
    assert 2 * LLAMA_8B.layer_parameters < again < 2.1 * LLAMA_8B.layer_parameters, "the head runs once"


def test_an_engine_gives_back_what_it_held(tmp_path: Path) -> None:
    """Many engines take turns in one process: on a GPU the next one needs the memory of the last one."""
    import torch
    from gpu_tables.bench import Bench
    from gpu_tables.table import Results

    from coserve.server.engine.adapter_pool import AdapterPool
    from coserve.server.engine.kv_cache import KVCache

    def alive() -> list[str]:
        return [type(thing).__name__ for thing in gc.get_objects() if type(thing) in (KVCache, AdapterPool)]

    gc.collect()
    before = alive()
    bench = Bench(torch.device("cpu"), True, 1, Results(None))
    with bench.stand(kv_memory=1 << 20, adapter_memory=1 << 20, max_model_len=64, slo_itl_ms=1000.0) as stand:
        requests = stand.generate(stand.prompts(2, 8), 3)
        stand.until(lambda: all(stand.tokens[request] == 3 for request in requests))
        assert len(alive()) == len(before) + 2 and stand.ready.max_model_len == 64
    bench.memory.release()
    assert alive() == before


def test_a_machine_without_a_gpu_is_told_of_the_toy_size() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--table", "decode"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "no CUDA device here; --smoke" in done.stderr and "Traceback" not in done.stderr
