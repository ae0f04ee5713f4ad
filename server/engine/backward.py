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

from coserve.kernels.attention.training import Attention, MaskCache, Score
from coserve.kernels.lora import LoraSegment
from coserve.server.engine.model import BaseModel
from coserve.server.engine.sweep import JobStep, Sweep
from coserve.server.training.peft.sites import Site


def run_backward_unit(model: BaseModel, sweep: Sweep, rows: int) -> None:
    """Do the last `rows` rows that are still to do in the sweep's current layer; ends at the layer's first row."""
    layer, end = sweep.layer, sweep.undone
    start = max(0, end - rows)
    unit = BackwardPass(sweep, layer, start, end)
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

    def __init__(self, sweep: Sweep, layer: int, start: int, end: int) -> None:
        store = sweep.store[layer]
        if store.x is None or store.k is None or store.v is None:
            raise RuntimeError(f"layer {layer} of the sweep has no store")
        self.sweep, self.layer, self.start, self.end = sweep, layer, start, end
        self.spans = sweep.spans(start, end)
        # Below layer 0 stand only frozen embeddings: no gradient is needed there.
        self.x = store.x[start:end].detach().requires_grad_(layer > 0)
        self.prefixes: dict[int, tuple[Tensor, Tensor]] = {}  # first row of a sequence -> leaves P_K, P_V
        self.thetas: dict[tuple[int, str], tuple[JobStep, Site, Tensor, Tensor, float]] = {}
        self.k: Tensor | None = None  # [Hkv, T, D] the window's own keys
        self.v: Tensor | None = None
        self._store = store
        self._masks = MaskCache(sweep.dtype, sweep.device)

    # ------------------------------------------------------------------ what the layer's modules ask for

    def segments(self, site: Site) -> list[LoraSegment]:
        return self.sweep.segments(site, self.start, self.end, self._leaf_pair)

    def stored(self, site: Site) -> Tensor | None:
        product = self._store.products.get(site.name)
        return None if product is None else product[self.start : self.end]

    def keep(self, site: Site, product: Tensor) -> None:
        pass  # kept in the forward

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        self.k, self.v = k, v
        pieces = []
        for span in self.spans:
            rows = slice(span.start - self.start, span.end - self.start)
            keys, values = k[:, rows], v[:, rows]
            if span.start > span.first:
                before = slice(span.first, span.start)
                p_k = self._store.k[:, before].detach().requires_grad_()  # type: ignore[index]
                p_v = self._store.v[:, before].detach().requires_grad_()  # type: ignore[index]
                self.prefixes[span.first] = (p_k, p_v)
                keys, values = torch.cat([p_k, keys], 1), torch.cat([p_v, values], 1)
            mask = self._masks.get(span.start - span.first, span.end - span.start, score.sliding_window)
            stored = None
            if self._store.out is not None and self._store.lse is not None:
                stored = (self._store.out[:, span.start : span.end], self._store.lse[:, span.start : span.end])
            out = Attention.apply(q[:, rows], keys, values, mask, score, sinks, stored)
            pieces.append(out.transpose(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _leaf_pair(self, step: JobStep, site: Site) -> tuple[Tensor, Tensor, float] | None:
        key = (id(step), site.name)
        if key not in self.thetas:
            pair = step.adapter.pair(site)
            if pair is None:
                return None
            a, b, scaling = pair
            self.thetas[key] = (step, site, a.detach().requires_grad_(), b.detach().requires_grad_(), scaling)
        _, _, a, b, scaling = self.thetas[key]
        return a, b, scaling

    # ------------------------------------------------------------------ the vector-Jacobian product

    def gradients(self, y: Tensor) -> Tensor | None:
        """y [T, H], the layer's output -> dx [T, H] (None below layer 0); all other gradients are accumulated."""
        sweep, rows = self.sweep, slice(self.start, self.end)
        if sweep.dy is None or self.k is None or self.v is None:
            raise RuntimeError("the head has not been run, or the layer has no attention")
        if sweep.dk is None or sweep.dv is None:
            sweep.dk, sweep.dv = torch.zeros_like(self._store.k), torch.zeros_like(self._store.v)  # type: ignore[arg-type]

        outputs = [(y, sweep.dy[rows]), (self.k, sweep.dk[:, rows]), (self.v, sweep.dv[:, rows])]
        outputs = [(tensor, seed) for tensor, seed in outputs if tensor.requires_grad]
        prefixes, thetas = list(self.prefixes.items()), list(self.thetas.values())
        inputs = [self.x] if self.x.requires_grad else []
        inputs += [leaf for _, pair in prefixes for leaf in pair]
        inputs += [leaf for theta in thetas for leaf in theta[2:4]]
        if not outputs or not inputs:
            return None
        grads = list(torch.autograd.grad(
            [tensor for tensor, _ in outputs], inputs, [seed for _, seed in outputs], materialize_grads=True
        ))  # fmt: skip

        dx = grads.pop(0) if self.x.requires_grad else None
        for first, (p_k, _) in prefixes:
            before = slice(first, first + p_k.shape[1])
            sweep.dk[:, before] += grads.pop(0)
            sweep.dv[:, before] += grads.pop(0)
        for step, site, *_ in thetas:
            step.add_gradient(site, grads.pop(0), grads.pop(0))
        return dx
