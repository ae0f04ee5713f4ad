"""The windowed backward: exact gradients of a causal decoder, one (layer, window) unit at a time.

Let layer l map inputs x to outputs y, where row t reads the keys and values k, v of rows <= t of its sequence.
Split the rows into windows w1 < w2 < … and write P for the keys and values before a window. Then

    y_w = f_l(x_w, [P; k_w], [P; v_w]),      k_w, v_w = functions of x_w alone.

Run the windows from the last to the first. When window w is reached, every later window has already added its
share to dK_w and dV_w, so they are complete, and one call of autograd over the window alone gives everything:

    (dx_w, dP_K, dP_V, dθ_l) = vjp of (y_w, k_w, v_w) against (x_w, P_K, P_V, θ_l), seeded with (dy_w, dK_w, dV_w)
    dK[P] += dP_K,   dV[P] += dP_V,   dθ_l accumulates,   dx_w is dy_w of layer l - 1.

The result is that of full-sequence autograd for every choice of windows, which need not be the forward's, and
the work can stop after any unit. The method is that of FlexLLM's token-level backward (Oliaro et al., 2024),
with gradients to keys and values accumulated over all windows and labels that never end with a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coserve.kernels.attention.training import Score
from coserve.server.engine.backend import Backend
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import Sweep
from coserve.server.training.peft.sites import Site


def run_backward_unit(model: BaseModel, sweep: Sweep, rows: int) -> None:
    """Do the last `rows` rows that are still to do in the sweep's current layer; ends at the layer's first row."""
    layer, end = sweep.layer, sweep.undone
    start = max(0, end - rows)
    unit = BackwardPass(sweep, layer, start, end, model.backend)
    with torch.enable_grad():
        call = model.frame.calls(sweep.positions[start:end])[layer]
        y = model.run_layer(layer, unit.x[None], call, unit)[0]
        dx = unit.gradients(y)
    if dx is not None and sweep.dy is not None:
        sweep.dy[start:end] = dx
    sweep.undone = start
    if start == 0:
        sweep.finish_layer()


class BackwardPass:
    """One (layer, window) unit: stream rows [start, end) through one layer with gradients on."""

    def __init__(self, sweep: Sweep, layer: int, start: int, end: int, backend: Backend) -> None:
        self._store = sweep.store
        self.sweep, self.layer, self.start, self.end = sweep, layer, start, end
        spans = sweep.spans(start, end)
        # Below layer 0 stand only frozen embeddings: no gradient is needed there.
        self.x = self._store.inputs(layer, start, end).detach().requires_grad_(layer > 0)
        # Only the window's first sequence can have begun before the window.
        self.prefix = slice(spans[0].first, start)
        self.before: tuple[Tensor, Tensor] | None = None  # leaves P_K, P_V
        self.k: Tensor | None = None  # [Hkv, T, D] the window's own keys
        self.v: Tensor | None = None
        self.adapters = backend.adapters(sweep.adapter_rows(start, end, gradients=True))
        lengths = [span.end - span.start for span in spans]
        self._spans = backend.span_rows(start - spans[0].first, lengths, sweep.dtype, sweep.device)

    # ------------------------------------------------------------------ what the layer's modules ask for

    def stored(self, site: Site) -> Tensor | None:
        return self._store.product(site, self.start, self.end)

    def keep(self, site: Site, product: Tensor) -> None:
        pass  # kept in the forward

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        self.k, self.v = k, v
        if self.prefix.stop > self.prefix.start:
            rows = self.prefix.start, self.prefix.stop
            p_k, p_v = self._store.keys(layer, *rows), self._store.values(layer, *rows)
            self.before = p_k.detach().requires_grad_(), p_v.detach().requires_grad_()
        stored = self._store.attention(layer, self.start, self.end)
        return self._spans.differentiable(q, k, v, self.before, score, sinks, stored).transpose(0, 1)

    # ------------------------------------------------------------------ the vector-Jacobian product

    def gradients(self, y: Tensor) -> Tensor | None:
        """y [T, H], the layer's output -> dx [T, H] (None below layer 0); all other gradients are accumulated."""
        sweep, rows = self.sweep, slice(self.start, self.end)
        if sweep.dy is None or self.k is None or self.v is None:
            raise RuntimeError("the head has not been run, or the layer has no attention")
        if sweep.dk is None or sweep.dv is None:
            sweep.dk, sweep.dv = (t.new_zeros(t.shape[0], sweep.rows, t.shape[2]) for t in (self.k, self.v))

        outputs = [(y, sweep.dy[rows]), (self.k, sweep.dk[:, rows]), (self.v, sweep.dv[:, rows])]
        outputs = [(tensor, seed) for tensor, seed in outputs if tensor.requires_grad]
        inputs = [self.x] if self.x.requires_grad else []
        inputs += [*(self.before or ()), *self.adapters.leaves()]
        if not outputs or not inputs:
            return None
        grads = list(torch.autograd.grad(
            [tensor for tensor, _ in outputs], inputs, [seed for _, seed in outputs], materialize_grads=True
        ))  # fmt: skip

        dx = grads.pop(0) if self.x.requires_grad else None
        if self.before is not None:
            sweep.dk[:, self.prefix] += grads.pop(0)
            sweep.dv[:, self.prefix] += grads.pop(0)
        self.adapters.accumulate(grads)
        return dx
