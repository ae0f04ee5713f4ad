"""Norms, rotary embeddings and gated activations of a transformers model, replaced where a function says the same.

Nothing is known of architectures or names. A module is replaced if its forward, run on random input in float32,
equals the function's; what equals nothing stays as it is. The load-time probe then compares the whole model.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from coserve.kernels.layer.reference import Activation

_BOUND = 1e-5  # relative norm in float32; a wrong epsilon, activation or order of halves is far over it
_HIDDEN, _WIDE = 16, 32  # of the stand-in for an MLP
# What a candidate may raise when it is called with something that it is not made for.
_NOT_ALIKE = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True, slots=True)
class LayerFunctions:
    """As in `coserve.kernels.layer`."""

    rms_norm: Callable[..., Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor, Activation], Tensor]


class RmsNorm(nn.Module):
    """In the place of a norm with this weight [H]."""

    def __init__(self, weight: nn.Parameter, eps: float, unit_offset: bool, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self._eps, self._unit_offset, self._function = weight, eps, unit_offset, function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, self.weight, self._eps, unit_offset=self._unit_offset)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), over the linear layers of the module that it replaces, under their names."""

    def __init__(
        self, linears: dict[str, nn.Module], roles: tuple[str, ...], gate_first: bool, activation: Activation,
        function: Callable[..., Tensor],
    ) -> None:  # fmt: skip
        """
        Args:
            roles: names of (gate, up, down), or of (both in one, down).
            gate_first: of the two halves where they are one.
        """
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._roles, self._gate_first, self._activation, self._function = roles, gate_first, activation, function

    def forward(self, x: Tensor) -> Tensor:
        *into, down = (getattr(self, name) for name in self._roles)
        gate, up = [linear(x) for linear in into] if len(into) == 2 else into[0](x).chunk(2, -1)
        if not self._gate_first:
            gate, up = up, gate
        return down(self._function(gate, up, self._activation))


@torch.no_grad()
def replace_modules(model: nn.Module, functions: LayerFunctions) -> dict[str, str]:
    """Changes the model in place; returns what was replaced: module name -> "norm" | "mlp" | "rotary"."""
    device = next(model.parameters()).device
    replaced: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if not name or any(name.startswith(done + ".") for done, kind in replaced.items() if kind == "mlp"):
            continue
        new = _norm_like(module, functions, device) or _mlp_like(module, functions, device)
        if new is not None:
            model.set_submodule(name, new)
            replaced[name] = "norm" if isinstance(new, RmsNorm) else "mlp"
        elif _turn_rotary(module, functions, device):
            replaced[name] = "rotary"
    return replaced


# ---------------------------------------------------------------------- norms


def _norm_like(module: nn.Module, functions: LayerFunctions, device: torch.device) -> RmsNorm | None:
    own = dict(module.named_parameters())
    if list(own) != ["weight"] or own["weight"].dim() != 1 or list(module.children()):
        return None
    weight = own["weight"]
    exact = copy.deepcopy(module).float()
    # One input small enough that epsilon counts.
    inputs = [_random(2, weight.shape[0], device=device, seed=seed) * scale for seed, scale in ((1, 1.0), (2, 1e-3))]
    epsilons = [value for value in vars(module).values() if isinstance(value, float)]
    for eps, unit_offset in itertools.product(epsilons, (False, True)):
        candidate = RmsNorm(nn.Parameter(weight.float(), requires_grad=False), eps, unit_offset, functions.rms_norm)
        if _alike(exact, candidate, inputs):
            return RmsNorm(own["weight"], eps, unit_offset, functions.rms_norm)
    return None


# ---------------------------------------------------------------------- gated activations


def _mlp_like(module: nn.Module, functions: LayerFunctions, device: torch.device) -> GatedMlp | None:
    linears = {name: m for name, m in module.named_children() if isinstance(m, nn.Linear)}
    if len(linears) != len([n for n, _ in module.named_parameters() if n.endswith("weight")]):
        return None  # it holds weights of another kind as well
    small: dict[str, nn.Module] = dict(linears)
    for roles in _possible_roles(linears):
        for place, name in enumerate(roles):
            last = place == len(roles) - 1
            sizes = (_WIDE, _HIDDEN) if last else (_HIDDEN, _WIDE if len(roles) == 3 else 2 * _WIDE)
            small[name] = _small_linear(*sizes, linears[name].bias is not None, device, seed=place)
        stand_in = copy.copy(module)
        stand_in.__dict__["_modules"] = {**module._modules, **small}
        inputs = [_random(3, _HIDDEN, device=device, seed=7)[None] * 2.0]
        for activation, first in itertools.product(get_args(Activation), (True, False) if len(roles) == 2 else (True,)):
            candidate = GatedMlp(small, roles, first, activation, functions.gated)
            if _alike(stand_in, candidate, inputs):
                return GatedMlp(dict(linears), roles, first, activation, functions.gated)
    return None


def _possible_roles(linears: dict[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Orders of the names in which their widths fit each other."""
    found = []
    for names in itertools.permutations(linears):
        *into, down = (linears[name] for name in names) if names else (None,)
        parts = 2 if len(into) == 1 else 1
        if len(into) in (1, 2) and all(m.out_features == parts * down.in_features for m in into):  # type: ignore[union-attr]
            found.append(tuple(names))
    return found


def _small_linear(wide: int, out: int, bias: bool, device: torch.device, seed: int) -> nn.Linear:
    linear = nn.Linear(wide, out, bias=bias, device=device, dtype=torch.float32)
    linear.weight.copy_(_random(out, wide, device=device, seed=10 + seed) / wide**0.5)
    if bias:
        linear.bias.copy_(_random(1, out, device=device, seed=20 + seed)[0])
    return linear


# ---------------------------------------------------------------------- rotary embeddings


def _turn_rotary(module: nn.Module, functions: LayerFunctions, device: torch.device) -> bool:
    """Give the module a forward of its own code in which the rotary function is ours.

    Modeling code calls it as a function of its file (q, k, cos, sin). Only this object's forward changes, no file's.
    """
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return False
    for name in forward.__code__.co_names:
        original = forward.__globals__.get(name)
        if not isinstance(original, types.FunctionType):
            continue
        if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
            continue
        turn = _Rotary(original, functions.rope)
        if not turn.proven(device):
            return False
        own = types.FunctionType(
            forward.__code__, {**forward.__globals__, name: turn}, forward.__name__, forward.__defaults__,
            forward.__closure__,
        )  # fmt: skip
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(own, module)
        return True
    return False


class _Rotary:
    """Called as modeling code calls its rotary function; ours for one packed row, the original for all else."""

    def __init__(self, original: Callable[..., Any], rope: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self._original, self._rope = original, rope

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or q.dim() != 4 or q.shape[0] != 1 or cos.dim() != 3 or cos.shape[0] != 1:
            return self._original(q, k, cos, sin, *args, **kwargs)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, heads, T, D], cos and sin [1, T, R]"""
        return self._rope(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None]

    def proven(self, device: torch.device) -> bool:
        """Tables of random angles, in pairs and not; partial where the original takes that."""
        q, k = (_random(heads * 3, 16, device=device, seed=heads).view(1, heads, 3, 16) for heads in (4, 2))
        tables = tuple(_random(3, 16, device=device, seed=seed)[None] for seed in (5, 6))
        try:
            theirs, ours = self._original(q, k, *tables), self(q, k, *tables)
        except _NOT_ALIKE:
            return False
        return all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------- comparing


def _alike(theirs: Callable[[Tensor], Any], ours: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> bool:
    try:
        return all(_close(ours(x), theirs(x)) for x in inputs)
    except _NOT_ALIKE:
        return False


def _close(got: Tensor, want: Any) -> bool:
    if not isinstance(want, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    return bool((got - want).norm() <= _BOUND * want.norm())


def _random(rows: int, columns: int, *, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(device)
