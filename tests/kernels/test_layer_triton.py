"""RMSNorm, rotary embedding and gated activation by Triton against the plain-torch reference in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_device import fresh_seed, kernel_device, poisoned_memory, relative_error

from coserve.kernels.layer import function, reference

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

# Two roundings to bfloat16 are off by 4e-3 at most; the interpreter truncates instead, which is twice that.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 9e-3}
BOTH = [torch.float32, torch.bfloat16]


def noise(seed, dtype, device, *shapes, strided=False):
    """Random tensors; `strided`: views into wider memory, as slices of a fused product are."""
    generator = torch.Generator().manual_seed(seed)
    wide = [(*shape[:-1], shape[-1] + 5 * strided) for shape in shapes]
    made = [torch.randn(*shape, generator=generator).to(dtype).to(device) for shape in wide]
    return [t[..., : shape[-1]] for t, shape in zip(made, shapes, strict=True)]


def compare(name, inputs, frozen, dtype, **how):
    """Worst row of output and of every gradient against the reference in float64; inputs must not change."""
    before = [t.clone() for t in inputs]
    wanted = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype).to(inputs[0].device)
    results = []
    for module, convert in ((function, lambda t: t.detach()), (reference, lambda t: t.detach().double())):
        leaves = [convert(t).requires_grad_() for t in inputs]
        with poisoned_memory():
            out = getattr(module, name)(*leaves, *map(convert, frozen), **how)
            results.append([out.detach(), *torch.autograd.grad((out * convert(wanted)).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    got, want = results
    assert all(t.dtype == dtype for t in got)
    return max(
        relative_error(g[row], w[row]) for g, w in zip(got, want, strict=True) for row in range(inputs[0].shape[0])
    )


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(7, 96), (1, 130), (3, 4, 64)])
def test_rms_norm(dtype, unit_offset, shape):
    seed, device = fresh_seed(), kernel_device()
    x, weight = noise(seed, dtype, device, shape, shape[-1:], strided=len(shape) == 2)
    assert compare("rms_norm", [x], [weight], dtype, eps=1e-5, unit_offset=unit_offset) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("heads,dim,rotary", [(3, 64, 64), (9, 32, 32), (2, 96, 40)])
def test_rope(dtype, heads, dim, rotary):
    seed, device = fresh_seed(), kernel_device()
    rows = 6
    x, angles = noise(seed, dtype, device, (heads, rows, dim), (rows, rotary))
    cos, sin = angles.float().cos().to(dtype), angles.float().sin().to(dtype)
    assert compare("rope", [x.transpose(0, 1)], [cos, sin], dtype) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(dtype, activation):
    seed, device = fresh_seed(), kernel_device()
    gate, up = noise(seed, dtype, device, (5, 1100), (5, 1100), strided=True)
    gate *= 3
    assert compare("gated", [gate, up], [], dtype, activation=activation) < BOUND[dtype]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_extreme_gates_stay_finite(activation):
    device = kernel_device()
    gate = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=device)
    up = torch.ones_like(gate)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out = function.gated(*leaves, activation)
    grads = torch.autograd.grad(out.sum(), leaves)
    want = reference.gated(gate.double(), up.double(), activation)
    assert torch.allclose(out.double(), want, atol=1e-6)
    assert all(g.isfinite().all() for g in grads)


def test_the_bounds_have_teeth():
    """Another eps, a table one position off, the other gelu: all are seen in bfloat16 as well."""
    seed, device = fresh_seed(), kernel_device()
    x, weight = noise(seed, torch.bfloat16, device, (4, 64), (64,))
    got = function.rms_norm(x, weight, 1e-5)
    assert relative_error(got, reference.rms_norm(x.double(), weight.double(), 0.2)) > 3 * BOUND[torch.bfloat16]
    heads, angles = noise(seed, torch.bfloat16, device, (6, 2, 32), (7, 32))
    got = function.rope(heads, angles[:6].cos(), angles[:6].sin())
    wrong = reference.rope(heads.double(), angles[1:].cos().double(), angles[1:].sin().double())
    assert relative_error(got, wrong) > 10 * BOUND[torch.bfloat16]
    gate, up = noise(seed, torch.float32, device, (4, 64), (4, 64))
    wrong = reference.gated(gate.double(), up.double(), "gelu_tanh")
    assert relative_error(function.gated(gate, up, "gelu"), wrong) > 10 * BOUND[torch.float32]


def test_what_does_not_fit_is_refused():
    device = kernel_device()
    x = torch.zeros(3, 2, 8, device=device)
    with pytest.raises(ValueError, match=r"tables \[3, 10\] and \[3, 10\] do not turn \[3, 2, 8\]"):
        function.rope(x, torch.zeros(3, 10, device=device), torch.zeros(3, 10, device=device))
    with pytest.raises(ValueError, match="they must agree"):
        function.gated(x, x[:, :, :4], "silu")
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        function.rms_norm(x.double(), torch.ones(8, device=device), 1e-6)
    with pytest.raises(ValueError, match="frozen"):
        function.rms_norm(x, torch.ones(8, device=device, requires_grad=True), 1e-6)
