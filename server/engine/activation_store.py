"""What a sweep keeps of every layer, in blocks of the K/V cache: one memory for generation and training.

Policy "recompute": the layers' inputs, and keys and values as attention sees them. Policy "save" adds the frozen
products and attention's output with its log-sum-exp; these lie in blocks of their own and can be given up at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from coserve.server.engine.kv_cache import KVCache, LayerShape
from coserve.server.engine.model import BaseModel
from coserve.server.engine.row_pages import RowPages, blocks_of, density, rows_in
from coserve.server.engine.shapes import layer_shapes
from coserve.server.training.peft.sites import Site

Place = tuple[bool, int, str]  # only kept under "save", layer, column

_INPUT, _KEYS, _VALUES, _OUT = "input", "keys", "values", "attention output"


class StoreLayout:
    """What is kept of a row in each layer of a model, and how many blocks rows take."""

    def __init__(self, model: BaseModel, layers: Sequence[LayerShape], block_size: int) -> None:
        self.always = [
            {_KEYS: s.kv_heads * s.key_dim, _VALUES: s.kv_heads * s.value_dim, _INPUT: model.hidden_size}
            for s in layers
        ]
        self.saved = [{_OUT: s.query_heads * s.value_dim} for s in layers]
        for site in model.sites:
            self.saved[site.layer][site.name] = site.out_features
        self._always = density(layers, self.always, block_size)
        self._saved = density(layers, self.saved, block_size)

    def blocks(self, rows: int, save: bool) -> int:
        """Of a sweep of `rows` rows, with what "save" keeps or without."""
        return blocks_of(rows, self._always) + (blocks_of(rows, self._saved) if save else 0)

    def rows(self, blocks: int, save: bool) -> int:
        """The most that a sweep of `blocks` blocks may have."""
        most = rows_in(blocks, self._always)
        while most and save and self.blocks(most, save) > blocks:
            # Both parts are nearly proportional to the rows: a few steps from a guess that is too large.
            most = min(most - 1, most * blocks // self.blocks(most, save))
        return most


class ActivationStore:
    """Of one sweep of `rows` rows, in the blocks that `StoreLayout.blocks` says."""

    def __init__(self, layout: StoreLayout, cache: KVCache, blocks: Sequence[int], rows: int, save: bool) -> None:
        self._layout, self._cache = layout, cache
        always = layout.blocks(rows, False)
        self._pages = RowPages(cache, layout.always, blocks[:always], rows)
        self._saved = RowPages(cache, layout.saved, blocks[always:], rows) if save else None
        self.lse: dict[int, Tensor] = {}  # layer -> [Hq, rows] (policy "save"): too small for blocks

    @property
    def blocks(self) -> list[int]:
        return self._pages.blocks + (self._saved.blocks if self._saved is not None else [])

    @property
    def held_bytes(self) -> int:
        """Of its blocks."""
        return len(self.blocks) * self._cache.block_bytes

    @property
    def rows(self) -> int:
        return self._pages.rows

    def tensors(self) -> Iterator[Tensor]:
        """What lies outside of the blocks."""
        yield from self.lse.values()
        for pages in (self._pages, self._saved):
            if pages is not None:
                yield from pages.tensors()

    # ------------------------------------------------------------------ writing

    def keep_input(self, layer: int, start: int, x: Tensor) -> None:
        """x [T, H], input of `layer` for stream rows from `start` on."""
        self._pages.write(layer, _INPUT, start, x)

    def keep_kv(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """k [Hkv, T, D], v [Hkv, T, Dv] for stream rows from `start` on."""
        self._pages.write(layer, _KEYS, start, _flat(k))
        self._pages.write(layer, _VALUES, start, _flat(v))

    def keep_product(self, site: Site, start: int, product: Tensor) -> None:
        """product [T, out], the frozen product of stream rows from `start` on (policy "save")."""
        if self._saved is not None:
            self._saved.write(site.layer, site.name, start, product)

    def keep_attention(self, layer: int, start: int, out: Tensor, lse: Tensor) -> None:
        """out [Hq, T, Dv], lse [Hq, T] of stream rows from `start` on (policy "save")."""
        if self._saved is None:
            return
        self._saved.write(layer, _OUT, start, _flat(out))
        if layer not in self.lse:
            self.lse[layer] = lse.new_empty(lse.shape[0], self.rows)
        self.lse[layer][:, start : start + lse.shape[1]] = lse

    # ------------------------------------------------------------------ reading: views, or copies

    def inputs(self, layer: int, start: int, end: int) -> Tensor:
        """[end - start, H], contiguous."""
        return self._pages.read(layer, _INPUT, start, end).contiguous()

    def keys(self, layer: int, start: int, end: int) -> Tensor:
        """[Hkv, end - start, D]"""
        return self._by_head(self._pages.read(layer, _KEYS, start, end), self._cache.layers[layer].kv_heads)

    def values(self, layer: int, start: int, end: int) -> Tensor:
        """[Hkv, end - start, Dv]"""
        return self._by_head(self._pages.read(layer, _VALUES, start, end), self._cache.layers[layer].kv_heads)

    def product(self, site: Site, start: int, end: int) -> Tensor | None:
        """[end - start, out]; None if products are not kept."""
        return None if self._saved is None else self._saved.read(site.layer, site.name, start, end)

    def attention(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor] | None:
        """(out [Hq, end - start, Dv], lse [Hq, end - start]); None if they are not kept."""
        if self._saved is None or layer not in self.lse:
            return None
        out = self._saved.read(layer, _OUT, start, end)
        return self._by_head(out, self._cache.layers[layer].query_heads), self.lse[layer][:, start:end]

    @staticmethod
    def _by_head(rows: Tensor, heads: int) -> Tensor:
        return rows.unflatten(1, (heads, -1)).transpose(0, 1)

    # ------------------------------------------------------------------ giving back

    def forget_products(self) -> list[int]:
        """From here on policy "recompute"; returns the blocks that are no longer needed."""
        if self._saved is None:
            return []
        given, self._saved = self._saved.blocks, None
        self.lse.clear()
        return given

    def keep_only(self, index: Tensor, layers: int) -> tuple[ActivationStore, list[int]]:
        """A store of the rows `index` (int64, ascending) in the first of this one's blocks, with what the first
        `layers` layers keep of them, and the blocks that are left over. This store is no longer to be used."""
        rows, save = len(index), self._saved is not None
        always, whole = self._layout.blocks(rows, False), self._layout.blocks(rows, save)
        mine, extra = self._pages.blocks, self._saved.blocks if self._saved is not None else []
        smaller = ActivationStore(self._layout, self._cache, mine[:always] + extra[: whole - always], rows, save)
        for layer in range(layers):
            for old, new in ((self._pages, smaller._pages), (self._saved, smaller._saved)):
                if old is None or new is None:
                    continue
                kept = {name: old.read(layer, name, 0, self.rows)[index] for name in old.columns(layer)}
                for name, values in kept.items():
                    new.write(layer, name, 0, values)
        smaller.lse = {layer: lse[:, index] for layer, lse in self.lse.items()}
        return smaller, mine[always:] + extra[whole - always :]

    # ------------------------------------------------------------------ to the host and back

    def contents(self, layers: int, rows: int) -> Iterator[tuple[Place, Tensor]]:
        """What the first `layers` layers keep of the first `rows` rows: (place, [rows, width])."""
        for saved, pages in ((False, self._pages), (True, self._saved)):
            if pages is None:
                continue
            for layer in range(layers):
                for name in pages.columns(layer):
                    yield (saved, layer, name), pages.read(layer, name, 0, rows)

    def put_back(self, place: Place, values: Tensor) -> None:
        """values [rows, width], the first rows of what `contents` had at this place."""
        saved, layer, name = place
        pages = self._saved if saved else self._pages
        if pages is not None:
            pages.write(layer, name, 0, values)


def private_store(
    model: BaseModel, rows: int, save: bool, layers: Sequence[LayerShape] | None = None
) -> ActivationStore:
    """One in memory of its own, for a sweep outside of an engine. `layers`: the model's shapes, if they are known."""
    layers = layer_shapes(model) if layers is None else layers
    layout = StoreLayout(model, layers, 16)
    count = layout.blocks(rows, save)
    cache = KVCache(layers, max(1, count), 16, model.dtype, model.device)
    return ActivationStore(layout, cache, range(count), rows, save)


def _flat(t: Tensor) -> Tensor:
    """[heads, T, D] -> [T, heads * D]"""
    return t.transpose(0, 1).flatten(1)
