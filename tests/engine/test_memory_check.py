"""A model whose budgets do not fit in memory is refused before it is loaded, with what to lower."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from engine_process import EngineProcess
from tiny_models import save_tiny_model, tiny_config

from coserve.server.engine.memory import free_host_bytes, kv_bytes, memory_problem
from coserve.server.engine.options import EngineOptions

MIB, TIB = 2**20, 2**40


def options(tmp_path, **values) -> EngineOptions:
    return EngineOptions(model="m", data_dir=tmp_path, socket_path="", device="cpu", **values)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("budget", ["activation_memory", "adapter_cache_memory"])
def test_budgets_that_do_not_fit_are_refused_with_the_remedy(model_folder, tmp_path, budget):
    engine = EngineProcess(model_folder, tmp_path, **{budget: TIB})
    with pytest.raises(RuntimeError, match="model refused") as refused:
        engine.start()
    assert engine._process.wait(60) == 3
    line = next(line for line in str(refused.value).splitlines() if "model refused" in line)
    assert "1024.0" in line and "GiB are free" in line
    remedies = line.rsplit("; ", 1)[1]
    assert remedies.startswith(f"lower --{budget.replace('_', '-')}"), "the largest first"


def test_each_part_counts(tmp_path):
    config = tiny_config("llama")
    small = {"kv_memory": MIB, "adapter_memory": MIB, "activation_memory": MIB, "adapter_cache_memory": MIB}
    assert memory_problem(MIB, config, torch.float32, options(tmp_path, **small)) is None
    for name in ("adapter_memory", "activation_memory", "adapter_cache_memory"):
        problem = memory_problem(MIB, config, torch.float32, options(tmp_path, **{**small, name: TIB}))
        assert f"lower --{name.replace('_', '-')}" in problem
    assert "a smaller model" in memory_problem(TIB, config, torch.float32, options(tmp_path, **small))


def test_the_kv_cache_counts_with_what_its_sequences_can_use(tmp_path):
    config = tiny_config("llama")  # 3 layers, 2 heads of 16, 512 positions
    a_token = 3 * 2 * 2 * 16 * 4
    asked = options(tmp_path, kv_memory=TIB, max_running=4, max_model_len=100)
    assert kv_bytes(config, torch.float32, asked) == 4 * 116 * a_token
    assert kv_bytes(config, torch.float32, options(tmp_path, kv_memory=MIB)) == MIB


def test_the_containers_limit_counts(tmp_path):
    assert free_host_bytes(tmp_path / "none") > 0
    for name, text in {"memory.max": f"{100 * MIB}\n", "memory.current": f"{90 * MIB}\n",
                       "memory.stat": f"anon 7\ninactive_file {20 * MIB}\nactive_file {MIB}\n"}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == 31 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes(tmp_path) > 31 * MIB


def test_the_processes_own_limit_counts():
    script = (
        "import resource; from coserve.server.engine.memory import free_host_bytes\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); print(free_host_bytes())"
    )
    out = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=150, check=True)
    assert 0 < int(out.stdout) <= 64 * MIB
