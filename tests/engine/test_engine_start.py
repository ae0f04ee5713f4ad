"""What the settings say reaches the scheduler; memory that holds nothing is refused with what would do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gradient_oracle import engine_model
from tiny_models import save_tiny_model

from coserve.scheduler import SchedulerConfig
from coserve.server.config import resolve_settings, write_process_settings
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.load import LoadedModel, ModelRefused
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.prefix_cache import BlockManager
from coserve.server.engine.shapes import layer_windows
from coserve.server.engine.start import _kv_cache, _pool, build_engine
from coserve.server.wire.lifeline import Heartbeat

pytestmark = pytest.mark.usefixtures("one_thread")


class Asked(Exception):
    """Ends the start where the scheduler would be made."""


def asked_for(tmp_path, architecture: str, environ: dict[str, str]) -> SchedulerConfig:
    """What an engine would start its scheduler with."""
    folder = save_tiny_model(tmp_path / "model", architecture)
    small = {"kv_memory": 2**20, "adapter_memory": 2**20, "activation_memory": 2**20, "adapter_cache_memory": 2**20}
    told = {"model": str(folder), "data_dir": tmp_path, "device": "cpu", "max_running": 2, "threads": 1, **small}
    path = tmp_path / "settings.json"
    write_process_settings(path, resolve_settings(told, environ=environ), str(tmp_path / "e.sock"))

    def policy(config: SchedulerConfig):
        raise Asked(config)

    with pytest.raises(Asked) as asked:
        build_engine(EngineOptions.read(path), Heartbeat(None), policy=policy)
    return asked.value.args[0]


@pytest.mark.parametrize(("environ", "floor"), [({}, 0.02), ({"COSERVE_FLOOR_SHARE": "0.1"}, 0.1)])
def test_the_floor_of_training_is_the_operators(tmp_path, environ, floor):
    config = asked_for(tmp_path, "llama:mini", environ)
    assert config.floor_share == floor and config.layer_windows == config.graph_rows == ()


def test_the_scheduler_is_told_how_far_layers_look_back_and_how_large_an_adapter_usually_is(tmp_path):
    config = asked_for(tmp_path, "gemma3_text:mini", {})
    model = engine_model("gemma3_text:mini", torch.float32)
    assert config.layer_windows == layer_windows(model) == (8, None)
    widths = [width for site in model.sites for width in (site.in_features, site.out_features)]
    page = 8 * model.hidden_size
    assert config.usual_pages == sum(-(-16 * width // page) for width in widths)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(engine_model("llama", torch.float32), "d" * 64, "llama", 100)


def refusal(loaded: LoadedModel, options: EngineOptions) -> str:
    with pytest.raises(ModelRefused) as refused:
        build_engine(options, Heartbeat(None), lambda _: loaded)
    return str(refused.value)


def test_memory_for_no_block_is_refused_with_what_a_context_takes(tmp_path, loaded):
    block = 16 * 3 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, their size, float32
    options = partial(EngineOptions, "base", tmp_path, str(tmp_path / "e.sock"), device="cpu")
    told = refusal(loaded, options(kv_memory=block - 1))
    assert f"--kv-memory {block - 1} holds no block" in told and f"takes {block} bytes" in told
    assert told.endswith(f"give at least {7 * block} for one full context")
    manager, _ = _kv_cache(loaded, options(kv_memory=7 * block))
    assert manager.num_blocks * manager.block_size >= 100


def test_memory_for_no_adapter_is_refused_with_what_the_smallest_takes(tmp_path, loaded):
    block = 16 * 3 * 2 * 2 * 16 * 4  # as above: six pages of 8 rank rows of the hidden size
    least = 7 * block  # A and B of rank 1 at 3 * 7 linear layers take a page each
    options = partial(EngineOptions, "base", tmp_path, str(tmp_path / "e.sock"), device="cpu", kv_memory=2**20)
    told = refusal(loaded, options(adapter_memory=least - 1))
    assert f"--adapter-memory {least - 1} holds no adapter" in told and f"takes 7 blocks of {block} bytes" in told
    assert f"give at least {least}, or 0" in told

    def pool(adapter_memory: int) -> tuple[AdapterPool, BlockManager]:
        chosen = options(adapter_memory=adapter_memory)
        blocks, cache = _kv_cache(loaded, chosen)
        return _pool(loaded, chosen, blocks, cache), blocks

    (some, beside), (none, alone) = pool(least), pool(0)
    assert (some.room.whole, none.room.whole) == (42, 0), "0: the model alone"
    assert beside.num_blocks == alone.num_blocks + 7, "generation may have them, too"
