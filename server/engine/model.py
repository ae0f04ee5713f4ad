"""The base model: transformers' modules with every linear layer made adapter-aware, driven layer by layer.

One copy of the weights serves every pass, of generation and of training. A *pass* (see `Pass`) says what the
rows of a layer call are: which adapter they use, what they attend to, what is kept of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coserve.kernels.attention.training import Score
from coserve.server.engine.attention import UnsupportedModel
from coserve.server.engine.backend import Backend, choose_backend
from coserve.server.engine.frame import Frame, LayerCall
from coserve.server.engine.linears import AdapterLinear, Binding, LinearGroup, RowsOfPass
from coserve.server.engine.product import FrozenProduct, compile_products, packing_available
from coserve.server.engine.siblings import sibling_linears
from coserve.server.training.peft.sites import Site

_SLICE_ROWS = 16384  # vocabulary rows of one slice of the head


class Pass(RowsOfPass, Protocol):
    """The rows of one layer call, as the modules inside the layer need to know them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None) -> Tensor:
        """See `coserve.server.engine.attention.AttentionPass`."""


class Head(nn.Module):
    """The language-model head without adapters, in slices of the vocabulary: all of them, or the one selected.

    A product with the whole vocabulary can outlast an iteration's budget and its result is large; a slice is
    neither. Logit scaling and capping work on each logit alone, so the model's own code runs on a slice as well.
    """

    def __init__(self, linear: nn.Linear, *, pack: bool, pack_transposed: bool) -> None:
        super().__init__()
        vocabulary = linear.out_features
        count = max(1, round(vocabulary / _SLICE_ROWS))
        borders = [vocabulary * i // count for i in range(count + 1)]
        self.slices = [slice(a, b) for a, b in itertools.pairwise(borders)]
        self.products = [
            FrozenProduct(
                [linear.weight[part]], [None if linear.bias is None else linear.bias[part]],
                pack=pack, pack_transposed=pack_transposed,
            )
            for part in self.slices
        ]  # fmt: skip
        self._weight = linear.weight.detach()
        self.selected: int | None = None

    @property
    def weight(self) -> Tensor:
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., V], or [..., rows of the selected slice]"""
        if self.selected is not None:
            return self.products[self.selected](x)[0]
        if len(self.products) == 1:
            return self.products[0](x)[0]
        return torch.cat([product(x)[0] for product in self.products], -1)


class BaseModel:
    """A causal LM of transformers, ready for packed passes.

    Takes the model over: its linear layers are replaced in place. Raises UnsupportedModel, with the reason,
    for structures that cannot be run exactly.
    """

    def __init__(self, model: Any, *, training: bool = True, backend: Backend | None = None) -> None:
        """`backend`: None chooses by the model's device and dtype."""
        self.hf = model.eval().requires_grad_(False)
        self.config = model.config
        self.base_name = model.base_model_prefix
        base = getattr(model, self.base_name)
        if not isinstance(getattr(base, "layers", None), nn.ModuleList):
            raise UnsupportedModel("it has no list of decoder layers named `layers`")
        self.layers: nn.ModuleList = base.layers
        _refuse_dynamic_rope(self.config)
        first = next(model.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.backend = backend or choose_backend("auto", self.dtype, self.device)
        self.backend.prepare(model)
        self._binding = Binding()
        self.layout: dict[str, tuple[int, int]] = {}  # site name -> (in, out); sites that share a launch side by side
        self._products: list[FrozenProduct] = []
        siblings = sibling_linears(Frame(model, self.base_name, "layers"), self.layers)
        self.sites: tuple[Site, ...] = tuple(self._wrap_linears(siblings, training))
        self.head = self._wrap_head(training)
        self.frame = Frame(model, self.base_name, "layers")

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.hf.get_output_embeddings().weight.shape[0])

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    def tensors(self) -> Iterator[Tensor | None]:
        """All that is kept of the model, packed products too; some more than once, or as views of one another."""
        for module in self.hf.modules():
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))
        for product in (*self._products, *self.head.products):
            yield from product.tensors()

    def sites_of(self, layer: int) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.layer == layer)

    def compile_products(self, rows: int, head_rows: int) -> None:
        """Before the first pass: what passes of up to `rows` rows, `head_rows` of them logits, make oneDNN compile."""
        compile_products(self._products, rows)
        compile_products(self.head.products, head_rows)

    def run_layer(self, layer: int, x: Tensor, call: LayerCall, current: Pass) -> Tensor:
        """x [1, T, H] -> [1, T, H] through one decoder layer, for the rows of `current`."""
        if self._binding.current is not None:
            raise RuntimeError("a layer was called inside another layer's call")
        self._binding.current = current
        try:
            out = self.layers[layer](x, *call.args, **call.kwargs, engine_ctx=current)
        finally:
            self._binding.current = None
        self.frame.set_layer_output(out)
        return out[0] if isinstance(out, tuple) else out

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the last layer [R, H] -> logits [R, V], without gradients."""
        with torch.no_grad():
            return self.frame.end(hidden)

    def logits_slice(self, hidden: Tensor, index: int) -> Tensor:
        """The logits of vocabulary `head.slices[index]`: [R, rows of it]. Differentiable in hidden."""
        self.head.selected = index
        try:
            return self.frame.end(hidden)
        finally:
            self.head.selected = None

    def _wrap_linears(self, siblings: list[list[list[str]]], training: bool) -> list[Site]:
        sites: list[Site] = []
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if parameter.dim() > 2:
                    raise UnsupportedModel(f"layer {index} holds its weights in a {parameter.dim()}-D tensor ({name})")
            linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
            prefix = f"{self.base_name}.layers.{index}."
            of_name = {name: Site(prefix + name, index, m.in_features, m.out_features) for name, m in linears.items()}
            called = {name for names in siblings[index] for name in names}
            if called != set(linears):
                unused = ", ".join(sorted(set(linears) - called))
                raise UnsupportedModel(f"layer {index} does not always use its linear layers ({unused})")
            for names in siblings[index]:
                product = self._product([linears[name] for name in names], training)
                self._products.append(product)
                members, first = [of_name[name] for name in names], len(self.layout)
                self.layout.update((site.name, (site.in_features, site.out_features)) for site in members)
                group = LinearGroup(product, members, self.layout, first, self._binding)
                for member, name in enumerate(names):
                    layer.set_submodule(name, AdapterLinear(group, member, linears[name].weight))
            sites += of_name.values()
        return sites

    def _wrap_head(self, training: bool) -> Head:
        linear = self.hf.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModel("its output head is not a linear layer")
        pack = packing_available(linear.weight.dtype, linear.weight.device)
        for name, module in self.hf.named_modules():
            if module is linear:
                head = Head(linear, pack=pack, pack_transposed=pack and training)
                self.hf.set_submodule(name, head)
                return head
        raise UnsupportedModel("its output head is not one of its modules")

    @staticmethod
    def _product(linears: Sequence[nn.Linear], training: bool) -> FrozenProduct:
        weights = [linear.weight for linear in linears]
        pack = packing_available(weights[0].dtype, weights[0].device)
        biases = [linear.bias for linear in linears]
        return FrozenProduct(weights, biases, pack=pack, pack_transposed=pack and training)


def _refuse_dynamic_rope(config: object) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        kind = rope.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedModel(
                f"its rotary tables ({kind}) change with the longest position of a batch, "
                "so a sequence's output would depend on what else is in it"
            )
