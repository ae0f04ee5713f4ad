"""Gradients of windowed training equal PEFT's full-sequence autograd, however the work is cut."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from float64 import float64_throughout
from gradient_oracle import PeftOracle, engine_model, new_step, new_sweep, random_rows, run_sweep, worst_error

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "phi3", "granite", "cohere"]
LENGTHS = [23, 1, 2, 70, 9]


def check(architecture, dtype, bound, *, windows, save, layers=None, head=16, lengths=LENGTHS):
    with float64_throughout() if dtype == torch.float64 else nullcontext():
        oracle = PeftOracle(architecture, dtype, rank=5, seed=1)
        model = engine_model(architecture, dtype)
        rows = random_rows(lengths, 512, seed=2)
        loss, reference = oracle.gradients(rows)
        step = new_step("a", oracle, rows)
        sweep = new_sweep(model, {"a": (step, rows)}, save=save)
        run_sweep(model, sweep, windows, head, windows[::-1], layers)
    assert abs(step.loss_sum / step.loss_tokens - loss) <= bound * abs(loss)
    assert worst_error(step, reference) <= bound


@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_every_window_in_float64(window, save):
    check("llama", torch.float64, 1e-9, windows=[window], save=save)


@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_float64(architecture, save):
    check(architecture, torch.float64, 1e-9, windows=[10, 5, 15, 7], save=save)


@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("window", [7, 64, 1000])
def test_float32(architecture, window, save):
    check(architecture, torch.float32, 1e-4, windows=[window], save=save)


def test_soft_capped_attention_against_eager():
    check("gemma2", torch.float64, 1e-9, windows=[9, 4], save=False)
    check("gemma2", torch.float64, 1e-9, windows=[9, 4], save=True)


def test_forward_in_layer_ranges():
    check("gemma3_text", torch.float64, 1e-9, windows=[13], save=False, layers=1)
    check("llama", torch.float64, 1e-9, windows=[13], save=True, layers=2)


def test_a_row_of_ten_windows_and_single_head_rows():
    check("qwen3", torch.float64, 1e-9, windows=[10], save=False, lengths=[100], head=1)


def test_two_jobs_of_different_rank_and_a_third_that_leaves_midway():
    with float64_throughout():
        model = engine_model("llama", torch.float64)
        oracles = {name: PeftOracle("llama", torch.float64, rank, seed=rank) for name, rank in
                   [("a", 3), ("b", 17), ("c", 4)]}  # fmt: skip
        rows = {name: random_rows([11, 30, 5], 512, seed=i) for i, name in enumerate(oracles)}
        for leave_after in (1, 4, 9, 14):
            steps = {name: (new_step(name, oracles[name], rows[name]), rows[name]) for name in oracles}
            sweep = new_sweep(model, steps, save=leave_after % 2 == 0)
            _run_until(model, sweep, units=leave_after)
            sweep.drop("b")
            _run_until(model, sweep, units=None)
            for name in ("a", "c"):
                _, reference = oracles[name].gradients(rows[name])
                assert worst_error(steps[name][0], reference) <= 1e-9


def _run_until(model, sweep, units, stop_at_head=False):
    """Carry out units of 16 rows until the sweep is done, or only so many of them, or until the head's turn."""
    from coserve.server.engine.backward import run_backward_unit
    from coserve.server.engine.forward import run_sweep_layers
    from coserve.server.engine.head import run_head_unit

    while not sweep.done and units != 0:
        if not sweep.forward_done:
            run_sweep_layers(model, sweep, min(16, sweep.rows - sweep.forward_rows), 2)
        elif sweep.head_left:
            if stop_at_head:
                return
            run_head_unit(model, sweep, 8)
        else:
            run_backward_unit(model, sweep, 16)
        units = None if units is None else units - 1


def test_a_head_batch_is_the_same_to_the_bit_however_its_slices_are_cut(monkeypatch):
    from coserve.server.engine import model as engine_model_module
    from coserve.server.engine.head import head_steps, run_head_unit

    monkeypatch.setattr(engine_model_module, "_SLICE_ROWS", 100)
    model = engine_model("gemma3_text", torch.float32)
    assert head_steps(model, backward=True) == 10
    oracle = PeftOracle("gemma3_text", torch.float32, rank=4, seed=1)
    rows = random_rows([40, 31], 512, seed=3)
    results = []
    for cut in (None, 1, 3):
        step = new_step("a", oracle, rows)
        sweep = new_sweep(model, {"a": (step, rows)}, save=False)
        _run_until(model, sweep, units=10**6, stop_at_head=True)
        while sweep.head_left:
            run_head_unit(model, sweep, 16, cut)
        results.append((step.loss_sum, step.correct, sweep.dy))
    for other in results[1:]:
        assert other[:2] == results[0][:2]
        assert torch.equal(other[2], results[0][2])
    check("gemma3_text", torch.float64, 1e-9, windows=[13], save=True)
    check("granite", torch.float64, 1e-9, windows=[13], save=False)


def test_head_batches_and_forward_windows_take_turns(monkeypatch):
    from coserve.server.engine import model as engine_model_module
    from coserve.server.engine.backward import run_backward_unit
    from coserve.server.engine.forward import run_sweep_layers
    from coserve.server.engine.head import run_head_unit

    monkeypatch.setattr(engine_model_module, "_SLICE_ROWS", 128)
    with float64_throughout():
        model = engine_model("llama", torch.float64)
        oracle = PeftOracle("llama", torch.float64, rank=4, seed=1)
        rows = random_rows([40, 31, 25], 512, seed=3)
        step = new_step("a", oracle, rows)
        sweep = new_sweep(model, {"a": (step, rows)}, save=True)
        while not sweep.done:
            if sweep.head_batch or sweep.head_ready >= 8:  # a batch stays part-way while windows go forward
                run_head_unit(model, sweep, 8, 1)
            if not sweep.forward_done:
                run_sweep_layers(model, sweep, min(9, sweep.rows - sweep.forward_rows), 2)
            elif sweep.head_left:
                run_head_unit(model, sweep, 8, 1)
            else:
                run_backward_unit(model, sweep, 16)
        _, reference = oracle.gradients(rows)
    assert worst_error(step, reference) <= 1e-9


@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
def test_bfloat16_is_as_near_to_float64_as_plain_autograd_in_bfloat16(save):
    plain = PeftOracle("llama", torch.bfloat16, rank=5, seed=1)
    rows = random_rows(LENGTHS, 512, seed=2)
    _, rounded = plain.gradients(rows)
    with float64_throughout():
        exact = PeftOracle("llama", torch.float64, rank=5, seed=1)
        exact.model.load_state_dict({name: t.double() for name, t in plain.model.state_dict().items()})
        loss, reference = exact.gradients(rows)
    model = engine_model("llama", torch.bfloat16)
    step = new_step("a", plain, rows)
    run_sweep(model, new_sweep(model, {"a": (step, rows)}, save=save), [10, 7], 16, [7, 10])
    assert abs(step.loss_sum / step.loss_tokens - loss) <= 0.02 * loss
    theirs = max(
        float((g.double() - w).norm() / w.norm())
        for m in reference
        for g, w in zip(rounded[m], reference[m], strict=True)
    )
    assert worst_error(step, reference) <= 1.25 * theirs
    assert theirs < 0.5, "the reference itself says nothing"
