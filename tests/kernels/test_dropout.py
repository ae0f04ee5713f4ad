"""Dropout's mask is a function of what a row is: of job, step, sequence, position and module, never of the cut."""

from __future__ import annotations

import pytest
import torch
from gradient_oracle import PeftOracle, engine_model, new_step, new_sweep, random_rows, run_sweep

from coserve.kernels.dropout import RowKeys, dropout_rows


def test_rows_keep_their_mask_wherever_they_run():
    x = torch.ones(40, 33)
    whole = dropout_rows(x, 0.3, (7, 2), "layers.0.q_proj", RowKeys.of([(3, 0, 25), (9, 4, 15)]))
    parts = [
        dropout_rows(x[:11], 0.3, (7, 2), "layers.0.q_proj", RowKeys.of([(3, 0, 11)])),
        dropout_rows(x[:20], 0.3, (7, 2), "layers.0.q_proj", RowKeys.of([(3, 11, 14), (9, 4, 6)])),
        dropout_rows(x[:9], 0.3, (7, 2), "layers.0.q_proj", RowKeys.of([(9, 10, 9)])),
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("key, module, runs", [
    ((8, 2), "m", [(3, 0, 64)]), ((7, 3), "m", [(3, 0, 64)]), ((7, 2), "n", [(3, 0, 64)]),
    ((7, 2), "m", [(4, 0, 64)]), ((7, 2), "m", [(3, 64, 64)]),
])  # fmt: skip
def test_every_part_of_the_key_gives_an_independent_mask(key, module, runs):
    x = torch.ones(64, 512)
    base = dropout_rows(x, 0.5, (7, 2), "m", RowKeys.of([(3, 0, 64)])) > 0
    other = dropout_rows(x, 0.5, key, module, RowKeys.of(runs)) > 0
    agreement = float((base == other).float().mean())
    assert abs(agreement - 0.5) < 0.02  # 32768 fair coins: 5 sigma is 0.014


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_rate_and_scale(rate):
    out = dropout_rows(torch.ones(256, 1024), rate, (1, 1), "m", RowKeys.of([(0, 0, 256)]))
    assert abs(float((out == 0).float().mean()) - rate) < 0.005
    assert torch.allclose(out[out > 0], torch.tensor(1 / (1 - rate)))
    rows, columns = (out == 0).float().mean(1), (out == 0).float().mean(0)
    assert float((rows - rate).abs().max()) < 0.1  # no row and no column stands out
    assert float((columns - rate).abs().max()) < 0.2


def test_gradients_with_dropout_do_not_depend_on_the_windows():
    torch.set_num_threads(1)
    oracle = PeftOracle("llama", torch.float64, rank=5, seed=1)
    rows = random_rows([23, 9, 40], 512, seed=2)
    model = engine_model("llama", torch.float64)
    results = []
    for window, save, rate in ((1000, False, 0.2), (7, True, 0.2), (13, False, 0.2), (1000, False, 0.0)):
        step = new_step("a", oracle, rows)
        step.dropout, step.dropout_key = rate, (11, 4)
        run_sweep(model, new_sweep(model, {"a": (step, rows)}, save=save), [window], 16, [window])
        results.append(step)
    for name, reference in results[0].grads.items():
        for index, tensor in enumerate(reference):
            for other in results[1:3]:
                assert float((other.grads[name][index] - tensor).norm() / tensor.norm()) < 1e-6
            assert float((results[3].grads[name][index] - tensor).norm() / tensor.norm()) > 1e-2
