"""Hundreds of adapters on the disk, tens in the pool: who is resident, with which values, and how many bytes."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_jobs import BASE_DIGEST, SITES

from coserve.server.engine.adapter_loader import AdapterLoader
from coserve.server.engine.adapter_pool import AdapterPool
from coserve.server.engine.adapters import AdapterBook
from coserve.server.training.peft.folder import read_folder, write_folder
from coserve.server.training.peft.lora import LoraConfig, LoraPair
from coserve.server.wire.messages import AdapterRef

torch.set_num_threads(1)
KNOWN, CLIENTS, REQUESTS = 400, 24, 1200
PAGE = 32  # elements
PAGES = 480  # about forty adapters
CACHE = 100_000  # bytes; about a hundred


def rank_of(number: int) -> int:
    return 1 + number % 4


def pages_of(number: int) -> int:
    widths = [width for site in SITES for width in (site.in_features, site.out_features)]
    return sum(-(-rank_of(number) * width // PAGE) for width in widths)


def bytes_of(number: int) -> int:
    return 4 * rank_of(number) * sum(site.in_features + site.out_features for site in SITES)


def write(folder: Path, number: int) -> AdapterRef:
    """An adapter whose As say its number, and whose Bs the opposite."""
    rank, value = rank_of(number), float(number + 1)
    weights = {
        site.name: LoraPair(
            torch.full((rank, site.in_features), value), torch.full((rank, site.out_features), -value)
        )
        for site in SITES
    }  # fmt: skip
    path = folder / str(number)
    path.mkdir()
    write_folder(path, LoraConfig(r=rank, alpha=float(rank)), weights, "tiny", BASE_DIGEST)
    return AdapterRef(f"{number:064x}", path.name)


class World:
    """Clients that want adapters, few of them often; each holds its own for a few turns."""

    def __init__(self, folder: Path) -> None:
        self.refs = [write(folder, number) for number in range(KNOWN)]
        self.reads = self.arrivals = self.most = 0
        self.pool = AdapterPool.of(4 * PAGE * PAGES, PAGE, torch.float32)
        self.loader = AdapterLoader(self._read, CACHE)
        self.book = AdapterBook(self.pool, self.loader, folder)
        self._rng = random.Random(3)
        self._waiting: list[int] = []
        self.running: list[tuple[int, int]] = []  # number, turn of its end
        self._turn = 0
        self.served: Counter[int] = Counter()

    def _read(self, path: Path) -> dict[str, LoraPair]:
        self.reads += 1
        return read_folder(path, SITES, BASE_DIGEST)[1]

    def turn(self) -> None:
        self._turn += 1
        missing = CLIENTS - len(self._waiting) - len(self.running)
        self._waiting += self._rng.choices(range(KNOWN), [1 / (n + 1) for n in range(KNOWN)], k=missing)
        before = set(self.pool.resident())
        wanted = [number for number, _ in self.running] + self._waiting
        assert not self.book.tick(self.refs[number] for number in wanted)
        self.arrivals += len(set(self.pool.resident()) - before)
        self.most = max(self.most, len(self.pool.resident()))
        begun = [number for number in self._waiting if self.book.ready(self.refs[number])]
        for number in begun:
            self._waiting.remove(number)
            self.book.acquire(self.refs[number])
            self.running.append((number, self._turn + self._rng.randrange(1, 4)))
            self.served[number] += 1
        if not begun:
            time.sleep(0.0005)  # for the loader

    def check(self) -> None:
        """What the book says of each, and what lies in the pool."""
        resident = self.pool.resident()
        for number, ref in enumerate(self.refs):
            there = ref.digest in resident
            assert self.book.ready(ref) == there and self.book.pages(ref) == there * pages_of(number)
        numbers = [int(digest, 16) for digest in resident]
        assert {number for number, _ in self.running} <= set(numbers), "nobody loses what it uses"
        used = 4 * PAGE * sum(map(pages_of, numbers))
        assert self.pool.bytes_used == used <= 4 * PAGE * PAGES
        kept = [int(digest, 16) for digest in self.loader._cache]
        assert self.loader.cached_bytes == sum(map(bytes_of, kept)) <= CACHE
        for number in numbers:
            a, b, scaling = self.book.handle(self.refs[number]).pair(SITES[-1])
            assert a.shape[0] == rank_of(number) and scaling == 1.0
            assert bool((a == number + 1).all()) and bool((b == -number - 1).all())

    def end(self) -> None:
        """Of those whose turn has come."""
        for number, until in self.running:
            if until <= self._turn:
                self.book.release(self.refs[number])
        self.running = [(number, until) for number, until in self.running if until > self._turn]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here is meant to last
    made = World(tmp_path)
    yield made
    made.book.close()


def test_hundreds_known_tens_resident_in_zipf_order(world):
    deadline = time.monotonic() + 60
    checks = 0
    while world.served.total() < REQUESTS:
        assert time.monotonic() < deadline
        world.turn()
        if world.served.total() // 20 > checks:
            checks = world.served.total() // 20
            world.check()
        world.end()
    world.pool.check()
    assert 30 <= world.most <= 60 and len(world.served) > 150
    assert world.reads < world.arrivals < REQUESTS, "some come back from the host's memory, most are still there"
    while not world.running:
        world.turn()
    for number in {number for number, _ in world.running}:
        world.book.drop(world.refs[number].digest)
    assert all(world.book.ready(world.refs[number]) for number, _ in world.running), "a dropped one serves to its end"
    ended = [number for number, _ in world.running]
    world.running = [(number, 0) for number in ended]
    world.end()
    assert not any(world.book.ready(world.refs[number]) for number in ended)
    world.check()
    world.pool.check()
