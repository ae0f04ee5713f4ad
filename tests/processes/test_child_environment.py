"""What the supervisor tells its children's libraries, and that the operator's own word stands."""

from __future__ import annotations

from coserve.server.config import Settings
from coserve.server.supervisor import child_environment

OURS = {
    "GOMP_SPINCOUNT": "10000", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip


def test_what_is_unset_is_set_and_what_is_set_stands(monkeypatch) -> None:
    for name in (*OURS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    alone = child_environment(Settings(model="somewhere"))
    assert {name: alone[name] for name in OURS} == OURS and "OMP_NUM_THREADS" not in alone
    for name in OURS:
        monkeypatch.setenv(name, "mine")
    told = child_environment(Settings(model="somewhere", threads=3))
    assert {told[name] for name in OURS} == {"mine"} and told["OMP_NUM_THREADS"] == "3"
