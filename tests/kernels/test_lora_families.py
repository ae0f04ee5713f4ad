"""Which family of LoRA launches a pass gets. No Triton."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.lora import Family, FamilyLimits, family_for

PER_ROW, GROUPED = Family.PER_ROW, Family.GROUPED


@pytest.mark.parametrize("rows,adapters,dtype,family", [
    (1, 1, torch.bfloat16, PER_ROW),
    (32, 32, torch.bfloat16, PER_ROW),
    (32, 8, torch.float16, PER_ROW),
    (32, 7, torch.bfloat16, GROUPED),  # more than four rows an adapter
    (33, 33, torch.bfloat16, GROUPED),
    (16, 16, torch.float32, PER_ROW),
    (17, 17, torch.float32, GROUPED),  # no matrix unit
])  # fmt: skip
def test_few_rows_of_many_adapters_go_row_by_row(rows, adapters, dtype, family):
    assert family_for(rows, adapters, dtype, gradients=False) is family


def test_what_is_differentiated_stays_grouped():
    assert family_for(1, 1, torch.bfloat16, gradients=True) is GROUPED


def test_limits_are_the_callers():
    ample = FamilyLimits(rows=128, rows_an_adapter=128)
    assert family_for(128, 1, torch.bfloat16, gradients=False, limits=ample) is PER_ROW
    assert family_for(1, 1, torch.bfloat16, gradients=False, limits=None) is GROUPED
