"""What the adapter pool does with its pages: tensors take them, fill them, are read from them and give them back.

Who has them and for how long is the pool's business. On CUDA a host image is copied beside the iterations, on a stream
of its own. Pages are cleared when they are given back: nothing of an adapter is left to whoever has the memory next.
Behind a tensor's rows its last page may hold anything, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coserve.kernels.transfer import integers
from coserve.server.engine.host_image import HostImage
from coserve.server.engine.page_source import PageSource
from coserve.server.engine.page_tables import PagedTensor

USUAL_RANK = 16  # of an adapter at every linear layer, in which the scheduler counts others


class AdapterPages:
    def __init__(self, source: PageSource) -> None:
        self.flat, self.page_elements = source.flat, source.page_elements
        self._source = source
        self._side = torch.cuda.Stream(self.flat.device) if self.flat.is_cuda else None

    def wanted(self, tensor: Tensor) -> int:
        """Pages that a tensor of this size takes."""
        return -(-tensor.numel() // self.page_elements)

    def take(self, tensors: Sequence[Tensor]) -> tuple[list[PagedTensor], tuple[int, ...]]:
        """Pages for tensors [rows, width] of these shapes, not yet written, and the units of the source they are in."""
        grant = self._source.take([self.wanted(tensor) for tensor in tensors])
        stored = [
            PagedTensor(tensor.shape[0], tensor.shape[1], pages, self.flat, self.page_elements)
            for tensor, pages in zip(tensors, grant.pages, strict=True)
        ]
        return stored, grant.units

    def write(self, stored: PagedTensor, tensor: Tensor) -> None:
        """[rows, width] -> its pages."""
        tensor = tensor.detach()
        if stored.consecutive:
            stored.where.copy_(tensor)
            return
        padded = self.flat.new_zeros(len(stored.pages) * self.page_elements)
        padded[: tensor.numel()].copy_(tensor.reshape(-1))
        self._by_page[stored.where] = padded.view(len(stored.pages), -1)

    def write_image(self, numbers: Sequence[int], image: HostImage) -> torch.cuda.Event | None:
        """A whole adapter in one copy and one scatter. On CUDA nobody waits for it: the event is its end."""
        if self._side is None:
            self._by_page[torch.tensor(numbers, device=self.flat.device)] = image.pages.to(self.flat.device)
            return None
        index = integers(numbers, self.flat.device, torch.int64)
        # Who had these pages before has read them, and they have been cleared, once the queue has come to here.
        self._side.wait_stream(torch.cuda.current_stream(self.flat.device))
        index.record_stream(self._side)
        with torch.cuda.stream(self._side):
            self._by_page.index_copy_(0, index, image.pages.to(self.flat.device, non_blocking=True))
            arrival = torch.cuda.Event()
            arrival.record(self._side)
        return arrival

    def read(self, stored: PagedTensor) -> Tensor:
        """[rows, width]: a view where its pages are consecutive, else a gathered copy."""
        if stored.consecutive:
            return stored.where
        gathered = self._by_page.index_select(0, stored.where)
        return gathered.view(-1)[: stored.rows * stored.width].view(stored.rows, stored.width)

    def give_back(self, numbers: Sequence[int], units: Sequence[int], arrival: torch.cuda.Event | None) -> None:
        """Cleared, in one launch; `arrival` is the end of the copy that may still be writing them."""
        if arrival is not None:
            torch.cuda.current_stream(self.flat.device).wait_event(arrival)
        self._by_page.index_fill_(0, integers(numbers, self.flat.device, torch.int64), 0)
        self._source.give(units)

    def check(self, held: Sequence[Sequence[int]], units: Sequence[Sequence[int]]) -> None:
        """Raise RuntimeError unless the pages in `held` are each held once, and `units` are what was taken."""
        pages = [page for some in held for page in some]
        if len(set(pages)) < len(pages):
            raise RuntimeError("a page of the adapter pool is held twice")
        self._source.check(units)

    @property
    def _by_page(self) -> Tensor:
        return self.flat.view(-1, self.page_elements)


def pages_at_rank(rank: int, wide_in: int, wide_out: int, page_elements: int) -> int:
    """Pages of an adapter of this rank at one linear layer: those of its A, and those of its B."""
    return -(-rank * wide_in // page_elements) + -(-rank * wide_out // page_elements)
