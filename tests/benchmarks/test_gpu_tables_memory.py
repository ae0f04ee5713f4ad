"""Memory that runs out under a GPU's table: it is a row that says so, and the table goes on."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.backend import PagedRows, SpanRows
from coserve.server.engine.kv_cache import KVCache
from coserve.server.engine.plain_backend import PlainBackend


@pytest.fixture(autouse=True)
def the_scripts_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))


class Scarce(PlainBackend):
    """Of a device that at times has no memory left for training, or for requests."""

    no_training = no_requests = False

    def span_rows(self, prefix: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> SpanRows:
        if self.no_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        return super().span_rows(prefix, lengths, dtype, device)

    def paged_rows(
        self, segments: Sequence[Any], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> PagedRows:
        if self.no_requests:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        return super().paged_rows(segments, block_size, dtype, device)


def scarce_bench(file: Path | None = None) -> tuple[Any, Scarce]:
    from gpu_tables.bench import Bench
    from gpu_tables.table import Results

    bench, backend = Bench(torch.device("cpu"), True, 1, Results(file)), Scarce()
    bench.model.base.backend = backend
    return bench, backend


def held() -> int:
    gc.collect()
    return sum(type(thing) in (KVCache, AdapterPool) for thing in gc.get_objects())


def test_engines_without_memory_are_rows_and_the_peers_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that runs out under `save`, an engine that does not start under `recompute`."""
    from gpu_tables import training

    monkeypatch.setattr(training, "TOY", replace(training.TOY, lengths=(32,), step_tokens=64, steps=1))
    bench, backend = scarce_bench(tmp_path / "figures.json")
    whole, before = type(bench).stand, held()

    def stand(self: Any, *arguments: Any, activations: str, **options: Any) -> Any:
        backend.no_training = activations == "recompute"
        made = whole(self, *arguments, activations=activations, **options)
        backend.no_training = True
        return made

    monkeypatch.setattr(type(bench), "stand", stand)
    training.run(bench)
    assert held() == before, "what ran out of memory is given back"
    table = json.loads((tmp_path / "figures.json").read_text())["tables"]["training"]
    assert table["complete"] and [row[1] for row in table["rows"]] == list(training.FORWARDS)
    for row in table["rows"][:2]:
        assert row[2] == "out of memory" and row[3] is None and not any(row[5:])
    assert all(row[2] > 0 for row in table["rows"][2:])
    assert [aim["met"] for aim in table["aims"]] == [False] * 4
    output = capsys.readouterr().out
    assert "coserve, save, length 32: out of memory: job alone failed: out_of_memory: Memory ran out" in output
    assert "coserve, recompute, length 32: out of memory: base: memory ran out while the engine started" in output
    assert "- save ÷ PEFT, length 32: out of memory, aim ≥ 1.3: missed" in output


def test_an_engine_serves_and_trains_on_after_what_ran_out() -> None:
    from gpu_tables.coserving import ALONE, OURS, TOY, Course, Switch, _aims

    bench, backend = scarce_bench()
    table = bench.table("co-serving", "A table", ["batch", "step ms", "floor ms"])
    switches: list[Switch] = []

    def policy(config: Any) -> Switch:
        switches.append(Switch(config))
        return switches[-1]

    with bench.stand(
        policy=policy, slo_itl_ms=1000.0, slo_ttft_ms=1000.0, kv_memory=4 << 20, adapter_memory=4 << 20,
        max_model_len=128,
    ) as stand:  # fmt: skip

        def decode() -> bool:
            requests = stand.generate(stand.prompts(2, 8), 3)
            stand.until(lambda: all(stand.tokens[request] == 3 for request in requests))
            return True

        backend.no_requests = True
        assert bench.attempt(table, "batch 2", decode, stand) is None
        table.lack(2)
        backend.no_requests = False
        assert bench.attempt(table, "batch 2", decode, stand)
        with pytest.raises(ZeroDivisionError):  # what is no lack of memory is a fault of the benchmark
            bench.attempt(table, "batch 2", lambda: 1 / 0)
        assert table.rows == [(2, "out of memory", None)] and len(table.notes) == 2

        course = Course(stand, switches[-1], bench, replace(TOY, warm=0.0, seconds=0.05))
        backend.no_training = True
        with pytest.raises(MemoryError):
            stand.until(lambda: False)
        with pytest.raises(MemoryError, match="beside-1 failed: out_of_memory"):
            course.training_alone()
        backend.no_training = False
        assert course.serve(ALONE, 16.0, 0.1)["training"] == 0.0
        assert stand.events("beside-2", "step")
        course.end()
    _aims(TOY, table, 0.5, {OURS: {"attainment": 1.0, "gain": 1.3}})
    _aims(TOY, table, 0.9, {ALONE: {"attainment": 1.0, "gain": 0.9}})
    assert [aim.met for aim in table.aims] == [True, True, False, False, False]
