"""Training attention by Triton, forward and backward, against the plain-torch functions in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_device import fresh_seed, kernel_device, poisoned_memory

from coserve.kernels.attention.spans import KeySpan, span_batch
from coserve.kernels.attention.training import MaskCache, Score, attention_backward, attention_forward
from coserve.kernels.attention.varlen import VarlenAttention, varlen_forward

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

BOUND = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
BOTH = [torch.float32, torch.bfloat16]
# (rows, keys): whole sequences, windows behind a prefix, one row, a prefix of one, more than a tile of each.
SPANS = [(5, 5), (1, 40), (20, 85), (1, 1), (66, 67)]


class Case:
    """Spans with unused rows and keys, which hold NaN, between them."""

    def __init__(self, spans, heads, kv_heads, dim, value_dim, dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        self.spans, row, key = [], 1, 2
        for rows, keys in spans:
            self.spans.append(KeySpan(row, rows, key, keys))
            row, key = row + rows + 1, key + keys + 2
        shapes = [(heads, row, dim), (kv_heads, key, dim), (kv_heads, key, value_dim), (heads, row, value_dim)]
        made = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
        self.device, self.sinks = device, torch.randn(heads, generator=generator)
        for tensor, starts, counts in (
            (made[0], [s.start for s in self.spans], [s.rows for s in self.spans]),
            (made[1], [s.first_key for s in self.spans], [s.keys for s in self.spans]),
            (made[2], [s.first_key for s in self.spans], [s.keys for s in self.spans]),
        ):
            used = torch.zeros(tensor.shape[1], dtype=torch.bool)
            for start, count in zip(starts, counts, strict=True):
                used[start : start + count] = True
            tensor[:, ~used] = torch.nan
        self.q, self.k, self.v, self.grad = made

    def batch(self):
        return span_batch(self.spans, self.q.shape[2] * self.q.element_size(), self.device)

    def kernel(self, score, sinks=False, stored=None):
        """[out, dq, dk, dv]"""
        leaves = [t.clone().to(self.device).requires_grad_() for t in (self.q, self.k, self.v)]
        with poisoned_memory():
            sink = self.sinks.to(self.device) if sinks else None
            out = VarlenAttention.apply(*leaves, self.batch(), score, sink, stored)
            grads = torch.autograd.grad(out, leaves, self.grad.to(self.device))
        return [t.detach().cpu() for t in (out, *grads)]

    def worst(self, results, score, sinks=False):
        """The largest relative error of a span's out, dq, dk or dv; what belongs to no span must be zero."""
        found, rest = [0.0], [t.clone() for t in results]
        for s in self.spans:
            rows, keys = slice(s.start, s.start + s.rows), slice(s.first_key, s.first_key + s.keys)
            q, k, v, grad = (
                t[:, part].double() for t, part in ((self.q, rows), (self.k, keys), (self.v, keys), (self.grad, rows))
            )
            mask = MaskCache(torch.float64, "cpu").get(s.keys - s.rows, s.rows, score.sliding_window)
            sink = self.sinks.double() if sinks else None
            out, lse = attention_forward(q, k, v, mask, score, sink)
            want = [out, *attention_backward(grad, q, k, v, out, lse, mask, score, sink)]
            want = [t.detach() for t in want]
            for got, w, part, left in zip(results, want, (rows, rows, keys, keys), rest, strict=True):
                # Where softmax sees one key alone, dq and dk are zero: measured against the span's largest gradient.
                size = w.norm() if got is results[0] else max(t.norm() for t in want[1:])
                found.append(float((got[:, part].double() - w).norm() / size))
                left[:, part] = 0
        assert not any(t.any() for t in rest)
        assert all(error == error for error in found), "NaN"
        return max(found)


SCORES = {
    "plain": Score(0.3),
    "window": Score(0.3, sliding_window=19),
    "window of one": Score(0.3, sliding_window=1),
    "softcap": Score(0.3, softcap=2.5),
    "all": Score(0.3, sliding_window=70, softcap=3.0),
}


@pytest.mark.parametrize("name", SCORES)
def test_spans_with_prefixes(name):
    seed, device, sinks = fresh_seed(), kernel_device(), name in ("window", "all")
    case = Case(SPANS, 2, 1, 16, 16, torch.float32, device, seed)
    assert case.worst(case.kernel(SCORES[name], sinks), SCORES[name], sinks) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    "heads,kv_heads,dim,value_dim",
    [(2, 2, 64, 64), (3, 1, 80, 80), (4, 1, 128, 128), (2, 1, 256, 256), (4, 2, 96, 48)],
)
def test_heads(dtype, heads, kv_heads, dim, value_dim):
    seed, device = fresh_seed(), kernel_device()
    case, score = Case([(20, 33), (3, 3)], heads, kv_heads, dim, value_dim, dtype, device, seed), Score(dim**-0.5, 25)
    results = case.kernel(score)
    assert all(t.dtype == dtype for t in results)
    assert case.worst(results, score) < BOUND[dtype]


def test_stored_statistics_replace_the_forward():
    seed, device = fresh_seed(), kernel_device()
    case, score = Case(SPANS, 2, 1, 16, 16, torch.float32, device, seed), Score(0.3, softcap=4.0)
    tensors = [t.to(device) for t in (case.q, case.k, case.v)]
    stored = varlen_forward(*tensors, case.batch(), score, case.sinks.to(device))
    fresh = case.kernel(score, sinks=True)
    for a, b in zip(fresh, case.kernel(score, sinks=True, stored=stored), strict=True):
        assert torch.equal(a, b)


def test_no_spans():
    device = kernel_device()
    case = Case([], 2, 1, 16, 16, torch.float32, device, 1)
    assert not any(t.any() for t in case.kernel(Score(1.0)))


@pytest.mark.parametrize("dtype", BOTH)
def test_the_bounds_have_teeth(dtype):
    """A key too many or too few of 64, another cap, a forgotten sink: all are seen."""
    seed, device = fresh_seed(), kernel_device()
    case, right = Case([(30, 90)], 4, 2, 32, 32, dtype, device, seed), Score(0.18, 64, 5.0)
    case.sinks += 3
    results = case.kernel(right, sinks=True)
    assert case.worst(results, right, sinks=True) < BOUND[dtype]
    for wrong in (Score(0.18, 63, 5.0), Score(0.18, 65, 5.0), Score(0.18, 64, 3.0)):
        assert case.worst(results, wrong, sinks=True) > 2 * BOUND[dtype]
    assert case.worst(results, right) > 2 * BOUND[dtype]


def test_what_the_kernel_cannot_do_is_refused():
    device = kernel_device()
    q = torch.zeros(1, 1, 320, device=device)
    batch = span_batch([KeySpan(0, 1, 0, 1)], 64, device)
    with pytest.raises(ValueError, match="heads of 320 and 320 values: the kernel takes at most 256"):
        varlen_forward(q, q, q, batch, Score(1.0))
    with pytest.raises(ValueError, match=r"q is torch\.float64"):
        varlen_forward(*[q[..., :64].double()] * 3, batch, Score(1.0))
    with pytest.raises(ValueError, match="the span at row 3 has 4 rows and 2 keys"):
        span_batch([KeySpan(3, 4, 0, 2)], 64)
