"""Which backend a model gets, and what is refused at load with what would do."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_model

from coserve.server.engine import load
from coserve.server.engine.backend import choose_backend
from coserve.server.engine.load import ModelRefused, load_model
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.plain_backend import PlainBackend

CPU = torch.device("cpu")


def test_a_cpu_gets_plain_torch():
    assert choose_backend("auto", torch.float32, CPU).name == "torch"
    assert choose_backend("torch", torch.bfloat16, torch.device("cuda")).name == "torch"


def test_kernels_where_they_cannot_run_are_refused():
    with pytest.raises(ValueError, match=r"they need a CUDA device, not cpu|Triton is not installed"):
        choose_backend("triton", torch.float32, CPU)
    with pytest.raises(ValueError, match=r"not torch\.float64|Triton is not installed"):
        choose_backend("triton", torch.float64, torch.device("cuda"))
    with pytest.raises(ValueError, match="choose one of auto, torch, triton"):
        choose_backend("cuda", torch.float32, CPU)


@pytest.fixture
def options(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama:mini")
    return EngineOptions(str(folder), tmp_path, "", device="cpu", kv_memory=2**20, adapter_memory=2**20,
                         activation_memory=2**20, adapter_cache_memory=2**20, max_running=2)  # fmt: skip


def test_an_unfit_device_is_a_refused_model(options):
    with pytest.raises(ModelRefused, match="the kernels cannot be used"):
        load_model(EngineOptions(**{**{f: getattr(options, f) for f in options.__slots__}, "kernels": "triton"}))


def test_heads_too_large_for_the_kernels_are_refused_with_the_largest(options, monkeypatch):
    class Narrow(PlainBackend):
        largest_head: int | None = 8

    monkeypatch.setattr(load, "choose_backend", lambda *_: Narrow())
    with pytest.raises(ModelRefused, match="heads have 16 values and the kernels take at most 8"):
        load_model(options)
