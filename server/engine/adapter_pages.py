"""The adapter pool's memory: one flat tensor in pages of equal size, which tensors take, fill and give back.

Who has them and for how long is the pool's business. On CUDA a host image is copied beside the iterations, on a stream
of its own. Free pages are zero, from the start and whenever one is given back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coserve.kernels.transfer import integers
from coserve.server.engine.host_image import HostImage
from coserve.server.engine.kv_cache import BlockAllocator
from coserve.server.engine.page_tables import PagedTensor

USUAL_RANK = 16  # of an adapter at every linear layer, in which the scheduler counts others


class AdapterPages:
    def __init__(self, num_pages: int, page_elements: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.flat = torch.zeros(num_pages * page_elements, dtype=dtype, device=device)
        self.page_elements = page_elements
        self.num_pages = num_pages
        self._allocator = BlockAllocator(num_pages)
        self._side = torch.cuda.Stream(device) if self.flat.is_cuda else None

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return self._allocator.free_blocks

    def wanted(self, tensor: Tensor) -> int:
        """Pages that a tensor of this size takes."""
        return -(-tensor.numel() // self.page_elements)

    def take(self, tensor: Tensor) -> PagedTensor:
        """Pages for a tensor [rows, width] of this shape, not yet written."""
        rows, width = tensor.shape
        pages = tuple(self._allocator.allocate(self.wanted(tensor)))
        return PagedTensor(rows, width, pages, self.flat, self.page_elements)

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

    def give_back(self, numbers: Sequence[int], arrival: torch.cuda.Event | None) -> None:
        """Cleared, in one launch; `arrival` is the end of the copy that may still be writing them."""
        if arrival is not None:
            torch.cuda.current_stream(self.flat.device).wait_event(arrival)
        self._by_page.index_fill_(0, integers(numbers, self.flat.device, torch.int64), 0)
        for page in numbers:
            self._allocator.free(page)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise RuntimeError unless `held` and the free pages are all pages, each once, and free pages are zero."""
        self._allocator.check(held)
        used = {page for pages in held for page in pages}
        free = [page for page in range(self.num_pages) if page not in used]
        if free and bool(self._by_page[free].any()):
            raise RuntimeError("a free page of the adapter pool is not zero")

    @property
    def _by_page(self) -> Tensor:
        return self.flat.view(self.num_pages, -1)


def pages_at_rank(rank: int, wide_in: int, wide_out: int, page_elements: int) -> int:
    """Pages of an adapter of this rank at one linear layer: those of its A, and those of its B."""
    return -(-rank * wide_in // page_elements) + -(-rank * wide_out // page_elements)
