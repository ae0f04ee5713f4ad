"""What the settings say reaches the scheduler."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_model

from coserve.scheduler import SchedulerConfig
from coserve.server.config import resolve_settings, write_process_settings
from coserve.server.engine.options import EngineOptions
from coserve.server.engine.start import build_engine
from coserve.server.wire.lifeline import Heartbeat


class Asked(Exception):
    """Ends the start where the scheduler would be made."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("environ", "floor"), [({}, 0.02), ({"COSERVE_FLOOR_SHARE": "0.1"}, 0.1)])
def test_the_floor_of_training_is_the_operators(tmp_path, environ, floor):
    folder = save_tiny_model(tmp_path / "model", "llama:mini")
    small = {"kv_memory": 2**20, "adapter_memory": 2**20, "activation_memory": 2**20, "adapter_cache_memory": 2**20}
    told = {"model": str(folder), "data_dir": tmp_path, "device": "cpu", "max_running": 2, "threads": 1, **small}
    path = tmp_path / "settings.json"
    write_process_settings(path, resolve_settings(told, environ=environ), str(tmp_path / "e.sock"))

    def policy(config: SchedulerConfig):
        raise Asked(config)

    with pytest.raises(Asked) as asked:
        build_engine(EngineOptions.read(path), Heartbeat(None), policy=policy)
    assert asked.value.args[0].floor_share == floor
