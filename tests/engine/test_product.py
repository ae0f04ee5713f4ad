"""Packed products are filled up to few numbers of rows, and nobody sees the rows that fill them up."""

from __future__ import annotations

import pytest
import torch

from coserve.server.engine.product import FrozenProduct, compile_products, filled_up, packing_available

pytestmark = pytest.mark.skipif(
    not packing_available(torch.float32, torch.device("cpu")), reason="this CPU's torch has no oneDNN"
)


def test_numbers_of_rows_are_few_and_little_larger() -> None:
    numbers = [filled_up(rows) for rows in range(1, 1025)]
    assert numbers == sorted(numbers) and len(set(numbers)) < 64
    assert all(rows <= filled <= max(rows, 1.25 * rows, rows + 7) for rows, filled in enumerate(numbers, 1))
    assert numbers[:16] == list(range(1, 17)) and all(filled_up(n) == n for n in set(numbers))


@pytest.mark.parametrize("rows", [1, 16, 17, 63, 65, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_products_and_gradients_are_those_of_the_plain_weights(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(out, 24, generator=generator) for out in (40, 8)]
    biases = [torch.randn(40, generator=generator) if biased else None, None]
    product = FrozenProduct(weights, biases, pack=True, pack_transposed=True)
    compile_products([product], 64)
    x = torch.randn(rows, 24, generator=generator, requires_grad=True)
    got = product(x)
    want = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    dy = [torch.randn(y.shape, generator=generator) for y in want]
    (dx,) = torch.autograd.grad(got, x, dy)
    torch.testing.assert_close(dx, sum(g @ w for g, w in zip(dy, weights, strict=True)), rtol=1e-4, atol=1e-4)
