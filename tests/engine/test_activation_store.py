"""A sweep's activations in any blocks of the cache, given back, parked and dropped at any unit: the same gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from float64 import float64_throughout
from gradient_oracle import PeftOracle, engine_model, new_step, random_rows

from coserve.server.engine.activation_store import ActivationStore, StoreLayout
from coserve.server.engine.backward import run_backward_unit
from coserve.server.engine.forward import run_sweep_layers
from coserve.server.engine.head import run_head_unit
from coserve.server.engine.job_step import TrainSequence
from coserve.server.engine.kv_cache import KVCache, LayerShape
from coserve.server.engine.model import BaseModel
from coserve.server.engine.row_pages import RowPages, blocks_of, density, rows_in
from coserve.server.engine.shapes import layer_shapes
from coserve.server.engine.sweep import Sweep

SIZE = 4  # tokens of a block


@pytest.fixture(autouse=True)
def exact():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with float64_throughout():
        yield
    torch.set_num_threads(before)


class Memory:
    """A cache full of NaN, from which blocks are taken at random: neighbours only by chance."""

    def __init__(self, model: BaseModel, blocks: int, seed: int = 0) -> None:
        layers = layer_shapes(model)
        self.layout = StoreLayout(model, layers, SIZE)
        self._cache = KVCache(layers, blocks, SIZE, model.dtype)
        for cells in self._cache.cells:
            cells.fill_(float("nan"))
        self._rng, self.free = random.Random(seed), set(range(blocks))

    def place(self, sweep: Sweep) -> None:
        wanted = self.layout.blocks(sweep.rows, sweep.save)
        blocks = sorted(self._rng.sample(sorted(self.free), wanted))
        self.free -= set(blocks)
        sweep.place(ActivationStore(self.layout, self._cache, blocks, sweep.rows, sweep.save))

    def back(self, blocks: list[int]) -> None:
        """What is free may become anything at once."""
        for tensor in (*self._cache.keys, *self._cache.values):
            for block in blocks:
                tensor[block * SIZE : (block + 1) * SIZE] = float("nan")
        assert not self.free & set(blocks)
        self.free |= set(blocks)


class Trained:
    """Two jobs' rows in one sweep, in units cut by a seed, with something done between them."""

    def __init__(self, architecture: str, *, save: bool = True) -> None:
        self.model = engine_model(architecture, torch.float64)
        self.oracles = {
            name: PeftOracle(architecture, torch.float64, rank, rank) for name, rank in (("a", 3), ("b", 5))
        }
        self.rows = {"a": random_rows([9, 14], 90, 1), "b": random_rows([11, 6], 90, 2)}
        self.steps = {name: new_step(name, self.oracles[name], self.rows[name]) for name in self.oracles}
        sequences = [
            TrainSequence(self.steps[name], row.input_ids, row.labels, i)
            for name, rows in self.rows.items() for i, row in enumerate(rows)
        ]  # fmt: skip
        model = self.model
        self.sweep = Sweep(sequences, layers=model.layer_count, dtype=model.dtype, device=model.device, save=save)
        self.memory = Memory(model, 3 * StoreLayout(model, layer_shapes(model), SIZE).blocks(self.sweep.rows, True))
        self.memory.place(self.sweep)

    def run(self, between: Callable[[int], None] = lambda unit: None) -> None:
        sweep, rng, unit = self.sweep, random.Random(5), 0
        while not sweep.done:
            between(unit)
            unit += 1
            if not sweep.forward_done:
                run_sweep_layers(self.model, sweep, min(rng.randint(3, 12), sweep.rows - sweep.forward_rows), 1)
            elif sweep.head_left:
                run_head_unit(self.model, sweep, 8)
            else:
                run_backward_unit(self.model, sweep, rng.randint(3, 12))

    def check(self, *names: str) -> None:
        for name in names:
            _, expected = self.oracles[name].gradients(self.rows[name])
            for module, want in expected.items():
                for got, tensor in zip(self.steps[name].grads[module], want, strict=True):
                    assert float((got - tensor).norm() / tensor.norm().clamp_min(1e-12)) < 1e-9, (name, module)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("save", [True, False])
def test_scattered_blocks_that_were_anything_before(architecture, save):
    trained = Trained(architecture, save=save)
    trained.run()
    trained.check("a", "b")


@pytest.mark.parametrize("save", [True, False])
def test_parked_after_every_unit_and_back_in_other_blocks(tmp_path, save):
    trained, plain = Trained("gemma3_text", save=save), Trained("gemma3_text", save=save)

    def between(unit: int) -> None:
        trained.memory.back(trained.sweep.park(tmp_path))
        assert not trained.sweep.placed
        with pytest.raises(RuntimeError, match="holds no memory"):
            _ = trained.sweep.store
        trained.memory.place(trained.sweep)

    trained.run(between)
    plain.run()
    for name, step in trained.steps.items():
        for module, pair in step.grads.items():
            assert all(map(torch.equal, pair, plain.steps[name].grads[module])), "to the bit"
    assert list(tmp_path.iterdir()) == [], "no file is left"


@pytest.mark.parametrize("at", [0, 5, 12, 20, 26])
def test_products_are_given_back_at_any_unit(at):
    trained = Trained("llama")
    before = len(trained.memory.free)

    def between(unit: int) -> None:
        if unit == at:
            given = trained.sweep.forget_products()
            assert len(given) == trained.memory.layout.blocks(trained.sweep.rows, True) - trained.memory.layout.blocks(
                trained.sweep.rows, False
            )
            trained.memory.back(given)

    trained.run(between)
    trained.check("a", "b")
    assert len(trained.memory.free) > before


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("parked", [True, False])
@pytest.mark.parametrize("at", [0, 5, 12, 20, 26])
def test_a_job_leaves_and_its_blocks_with_it(tmp_path, at, parked, save):
    trained = Trained("llama", save=save)

    def between(unit: int) -> None:
        if unit != at:
            return
        if parked:
            trained.memory.back(trained.sweep.park(tmp_path))
        held = len(trained.memory.free)
        trained.memory.back(trained.sweep.drop("a"))
        assert len(trained.memory.free) > held or parked
        if parked:
            trained.memory.place(trained.sweep)

    trained.run(between)
    trained.check("b")


def test_a_full_disk_leaves_a_sweep_where_it_is(tmp_path, monkeypatch):
    trained = Trained("llama")

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    def between(unit: int) -> None:
        if unit == 9:
            monkeypatch.setattr("os.posix_fallocate", full)
            with pytest.raises(OSError, match="No space"):
                trained.sweep.park(Path(tmp_path))
            assert trained.sweep.placed and list(tmp_path.iterdir()) == []

    trained.run(between)
    trained.check("a", "b")


def test_rows_of_uneven_columns_find_their_places():
    """Keys and values of unequal sizes, layers of unequal shapes, columns that are no whole number of cells."""
    layers = [LayerShape(2, 6, 4, 4), LayerShape(1, 8, 8, 2)]
    widths = [{"x": 7, "y": 12, "z": 1}, {"x": 30, "y": 8}]
    filled = density(layers, widths, SIZE)
    rows = rows_in(11, filled)
    assert blocks_of(rows, filled) <= 11 < blocks_of(rows + 1, filled)
    for blocks in (range(11), sorted(random.Random(1).sample(range(30), 11))):
        cache = KVCache(layers, 30, SIZE, torch.float64, scratch=True)
        pages = RowPages(cache, widths, blocks, rows)
        written = {}
        for layer, columns in enumerate(widths):
            for name, width in columns.items():
                values = torch.randn(rows, width, dtype=torch.float64)
                for start in range(0, rows, 5):
                    pages.write(layer, name, start, values[start : start + 5])
                written[layer, name] = values
        for (layer, name), values in written.items():
            assert torch.equal(pages.read(layer, name, 0, rows), values)
            assert torch.equal(pages.read(layer, name, 3, 9), values[3:9]) and not len(pages.read(layer, name, 4, 4))
        taken = {slot for block in blocks for slot in range(block * SIZE, (block + 1) * SIZE)}
        for layer in range(2):
            for tensor in (cache.keys[layer], cache.values[layer]):
                assert not tensor[[slot for slot in range(len(tensor)) if slot not in taken]].any(), "others' slots"
    with pytest.raises(ValueError, match="cells"):
        RowPages(cache, widths, range(10), rows)
