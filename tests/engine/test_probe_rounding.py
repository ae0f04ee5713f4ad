"""What is exact in float32 and loses too much in bfloat16 is found when a model is loaded."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from coserve.server.engine.attention import UnsupportedModel
from coserve.server.engine.plain_backend import PlainBackend
from coserve.server.engine.probe import probe


class Coarse(PlainBackend):
    """Its attention keeps 4 bits of the 8 that bfloat16 has."""

    def paged_rows(self, segments, block_size, dtype, device):
        rows = super().paged_rows(segments, block_size, dtype, device)
        return rows if dtype != torch.bfloat16 else CoarseRows(rows)


class CoarseRows:
    def __init__(self, rows) -> None:
        self._rows = rows

    def attend(self, *args):
        mantissa, exponent = torch.frexp(self._rows.attend(*args).float())
        return torch.ldexp((mantissa * 16).round() / 16, exponent).bfloat16()


def test_a_backend_that_rounds_too_much_is_refused_where_it_would_serve():
    config = tiny_config("llama")
    probe(config, Coarse())
    with pytest.raises(UnsupportedModel, match=r"in bfloat16 deviates .* by \d.\de-02 \(at most"):
        probe(config, Coarse(), dtype=torch.bfloat16)
