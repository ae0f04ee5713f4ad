"""Routing and page tables, with no Triton at all."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from paged_adapters import PagedAdapters

from coserve.kernels.lora import PagedTerms, RowRange, route

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_rows_are_grouped_and_cut_into_blocks_of_one_adapter():
    ranges = [RowRange(0, 3, 2), RowRange(4, 4, 1), RowRange(5, 10, 0), RowRange(12, 14, 2)]
    routing = route(ranges, 4, block_rows=4, chunk_rows=3)
    assert routing.rows.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 12, 13]
    assert routing.owners.tolist() == [0] * 5 + [2] * 5
    assert routing.blocks.tolist() == [[0, 0, 4], [0, 4, 1], [2, 5, 4], [2, 9, 1]]
    assert routing.chunks.tolist() == [[0, 0, 3], [0, 3, 2], [2, 5, 3], [2, 8, 2]]
    assert routing.chunk_starts.tolist() == [0, 2, 2, 4, 4]


def test_blocks_grow_with_the_groups():
    assert [route([RowRange(0, n, 0)], 1).block_rows for n in (1, 31, 32, 63, 64, 4096)] == [16, 16, 32, 32, 64, 64]
    assert route([RowRange(n, n + 1, n) for n in range(64)], 64).block_rows == 16


@pytest.mark.parametrize("ranges,message", [
    ([RowRange(0, 4, 0), RowRange(3, 5, 0)], r"rows \[3, 5\) begin before row 4"),
    ([RowRange(4, 3, 0)], "end before they begin"),
    ([RowRange(0, 1, 2)], "name adapter 2; the page table holds 2"),
])  # fmt: skip
def test_impossible_ranges_are_refused(ranges, message):
    with pytest.raises(ValueError, match=message):
        route(ranges, 2)


def test_a_page_table_reads_what_the_pool_holds():
    sites = {"q": (20, 12), "down": (36, 20)}
    adapters = PagedAdapters([3, {"down": 9}, {"q": 1}], sites, torch.float32, CPU, page_elements=17, seed=3)
    table = adapters.table()
    assert table.ranks == ((3, 0, 1), (3, 9, 0))
    assert table.widths == ((20, 12), (36, 20))
    assert table.index[..., 3].tolist() == [[0, 3, 3], [0, 3, 12]]
    for nth, site in enumerate(sites):
        for number, key in enumerate(adapters.keys):
            held = adapters.pool.tensors(key, site)
            assert (held is None) == (table.ranks[nth][number] == 0)
            if held is not None:
                a, b, scaling = table.at(nth).pair(0, number)
                assert torch.equal(a, held[0]) and torch.equal(b, held[1]) and scaling == held[2]


def test_a_pair_of_other_widths_than_its_site_is_refused():
    pool = PagedAdapters([2], {"q": (20, 12)}, torch.float32, CPU, page_elements=64, seed=1).pool
    with pytest.raises(ValueError, match=r"q is \(24, 12\) wide \(in, out\), the pair of 0 \(20, 12\)"):
        pool.page_table(["0"], {"q": (24, 12)})


def test_terms_that_contradict_themselves_are_refused():
    adapters = PagedAdapters([2], {"q": (20, 12), "k": (20, 8)}, torch.float32, CPU, page_elements=64, seed=1)
    table = adapters.table()
    with pytest.raises(ValueError, match="routing knows 2 adapters, the pages 1"):
        PagedTerms(route([], 2), table.at(0))
    with pytest.raises(ValueError, match="dropout differs from site to site"):
        PagedTerms(route([RowRange(0, 1, 0)], 1), table.at(0, 2), dropout=(torch.relu,))
    with pytest.raises(ValueError, match="1 perturbations for 1 pairs"):
        PagedTerms(route([], 1), table.at(0), perturbations=(torch.zeros(()),))


def test_importing_the_kernels_needs_no_triton_and_no_server():
    code = (
        "import sys\n"
        "for name in ('triton', 'fastapi', 'pydantic', 'redis'): sys.modules[name] = None\n"
        "import coserve.kernels.attention, coserve.kernels.attention.training, coserve.kernels.layer\n"
        "import coserve.kernels.lora\n"
        "assert not any(name.startswith('coserve.server') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=150)
