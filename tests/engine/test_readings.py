"""Tokens that a device may choose by itself are those of the sampler."""

from __future__ import annotations

import pytest
import torch

from coserve.server.engine.sampler import SamplingRow, choose, chosen_on_device, sample
from coserve.server.wire.messages import SamplingParams

torch.set_num_threads(1)


def row(**params) -> SamplingRow:
    return SamplingRow(SamplingParams(max_tokens=4, **params), [1, 2], [3])


def test_choosing_on_the_device_gives_the_samplers_tokens():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 1500, generator=generator) * 3
    logits[4, 7] = float("nan")
    rows = [row(seed=n, temperature=t) for n, t in enumerate((0.0, 1.0, 0.3, 0.0, 1.7, 5.0))]
    assert all(map(chosen_on_device, rows))
    wanted = [sampled.token_id for sampled in sample(logits, rows)]
    assert choose(logits, rows).tolist() == wanted
    assert len(set(wanted)) > 3
    assert choose(logits[[0, 3]], [rows[0], rows[3]]).tolist() == [wanted[0], wanted[3]]


@pytest.mark.parametrize("params", [
    {"temperature": 1.0, "top_p": 0.5}, {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "logit_bias": {5: 1.0}},
])  # fmt: skip
def test_what_needs_more_is_left_to_the_sampler(params):
    assert not chosen_on_device(row(seed=0, **params))
