"""Which modules of the base model an adapter targets, by PEFT's rules for module names.

A site is one linear layer that the engine has wrapped; a fused projection is one site. Nothing here looks at a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve.server.training.peft.patterns import Pattern, Work, suffix_pattern

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer that adapters may target."""

    name: str  # as in the model's named_modules(): "model.layers.0.self_attn.q_proj"
    layer: int
    in_features: int
    out_features: int


def matches_targets(name: str, targets: Sequence[str]) -> bool:
    """PEFT's rule for a list of names: the whole name, or its end after a dot."""
    return any(name == target or name.endswith("." + target) for target in targets)


def select_sites(
    sites: Sequence[Site],
    target_modules: str | Sequence[str],
    *,
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> tuple[Site, ...]:
    """The targeted sites, in the model's order.

    `target_modules` is "all-linear", a list of names, or one regular expression for the whole name. As in PEFT,
    `layers_to_transform` narrows name lists only, and a name that is given in full is taken whatever its layer;
    a non-empty `layers_pattern` names the module list whose index counts ("layers").

    Raises PatternError for an expression that cannot be used.
    """
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            chosen = list(sites)
        else:
            pattern = Pattern(target_modules)
            chosen = [site for site in sites if pattern.matches(site.name)]
    else:
        chosen = [site for site in sites if matches_targets(site.name, target_modules)]
        if layers_to_transform:
            full = set(target_modules)
            wanted = set(layers_to_transform)
            chosen = [
                site for site in chosen if site.name in full or _layer_index(site.name, layers_pattern or ()) in wanted
            ]
    if exclude_modules:
        if isinstance(exclude_modules, str):
            excluded = Pattern(exclude_modules)
            chosen = [site for site in chosen if not excluded.matches(site.name)]
        else:
            chosen = [site for site in chosen if not matches_targets(site.name, exclude_modules)]
    return tuple(chosen)


def _layer_index(name: str, layers_pattern: Sequence[str]) -> int | None:
    """The first number after a list's name: 3 in "model.layers.3.mlp.up_proj"."""
    parts = name.split(".")
    for place in range(1, len(parts) - 1):
        if not parts[place].isdecimal():
            continue
        if not layers_pattern:
            if place >= 2:  # PEFT's expression wants a prefix before the list's name
                return int(parts[place])
        elif parts[place - 1] in layers_pattern:
            return int(parts[place])
    return None


class PatternTable:
    """rank_pattern or alpha_pattern: the first key, in the config's order, that matches a module's name.

    Raises PatternError for a key that cannot be used.
    """

    def __init__(self, entries: Sequence[tuple[str, float]]) -> None:
        work = Work()
        self._entries = tuple((_KeyMatcher(key, work), value) for key, value in entries)

    def get(self, name: str, default: float) -> float:
        for matcher, value in self._entries:
            if matcher.matches(name):
                return value
        return default


class _KeyMatcher:
    """One key. PEFT writes one key a module, plain names without operators: those need no automaton."""

    def __init__(self, key: str, work: Work) -> None:
        self._key = key
        self._plain = bool(key) and all(c == "." or c == "_" or c.isalnum() for c in key)
        self._pattern = None if self._plain else suffix_pattern(key, work)

    def matches(self, name: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(name)
        length = len(self._key)
        if len(name) < length or (len(name) > length and name[-length - 1] != "."):
            return False
        tail = name[len(name) - length :]
        return tail == self._key or (
            "." in self._key and all(k in (".", t) for k, t in zip(self._key, tail, strict=True))
        )
