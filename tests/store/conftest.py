import asyncio

import pytest

from coserve.server.store.store import Store


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    """A store with two tenants; `store.a` and `store.b` are their ids."""
    opened = Store(tmp_path / "coserve.db", clock=clock)
    opened.a = asyncio.run(opened.tenants.create("alpha")).id
    opened.b = asyncio.run(opened.tenants.create("beta")).id
    yield opened
    opened.close()
