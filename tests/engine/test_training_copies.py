"""A tenant's training copies and its share of the adapter memory: who waits, who is refused, who gets it back."""

from __future__ import annotations

import json

import torch
from engine_process import write_job
from peft_oracle import training_rows
from stepped_engine import DIGEST, SteppedEngine

from coserve.scheduler.state import TenantLimit
from coserve.server.engine.copies import OWN_JOBS
from coserve.server.engine.shares import Shares
from coserve.server.wire.messages import StartJob, TenantShare

torch.set_num_threads(1)


class World(SteppedEngine):
    """Jobs of tenant t with adapters of `pages` pages; its share of the pool is so many."""

    def __init__(self, data_dir, *, share: float | None, ranks=(4, 4, 4)) -> None:
        super().__init__(data_dir)
        for number, r in enumerate(ranks):
            write_job(data_dir, f"j{number}", DIGEST, training_rows(16, number), r=r)
        self.pages = sum(-(-4 * site.in_features // self.pool.page_elements) for site in self.model.sites)
        self.pages += sum(-(-4 * site.out_features // self.pool.page_elements) for site in self.model.sites)
        part = 1.0 if share is None else share * self.pages / self.pool.room.whole
        for number in range(len(ranks)):
            self.intake._start_job(StartJob(f"j{number}", "t", TenantShare(adapters=part)))

    @property
    def placed(self) -> list[str]:
        return [key.removeprefix("job:") for key in self.pool.resident()]

    @property
    def limit(self) -> int | None:
        return self.engine._outlook._shares.limits.get("t", TenantLimit()).adapter_pages

    def events(self, job: str) -> list[dict]:
        text = (self.data_dir / "jobs" / job / "events.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


def test_a_tenants_next_job_waits_for_its_own_and_its_requests_have_the_rest(tmp_path):
    world = World(tmp_path, share=2.5)
    world.until(lambda: world.trainer.waits)
    assert world.placed == ["j0", "j1"] and world.trainer.waits == {"j2": OWN_JOBS}
    assert world.limit == int(2.5 * world.pages) - 2 * world.pages
    world.until(world.trainer.states)
    told = [job for sweep in world.trainer.states() for job in sweep.jobs]
    assert told and all(job.adapter_pages == world.pages for job in told), "what a row of theirs passes through"
    most = 0

    def over() -> bool:
        nonlocal most
        most = max(most, len(world.pool.resident()))
        return not world.trainer.job_ids

    world.until(over)
    assert most == 2
    assert [world.events(f"j{n}")[-1]["kind"] for n in range(3)] == ["finished"] * 3
    assert world.limit == int(2.5 * world.pages), "what a copy held is given back"


def test_a_younger_job_does_not_overtake_one_that_waits_for_the_share(tmp_path):
    world = World(tmp_path, share=3.5, ranks=(16, 16, 4))
    world.until(lambda: world.trainer.waits)
    assert world.placed == ["j0"] and world.trainer.waits.keys() <= {"j1", "j2"}
    world.until(lambda: not world.trainer.job_ids)
    starts = [world.events(f"j{n}")[-1]["created_at"] for n in range(3)]
    assert starts == sorted(starts)


def test_a_job_larger_than_its_tenants_share_is_refused_with_both_sizes(tmp_path):
    world = World(tmp_path, share=1.5, ranks=(16,))
    world.until(lambda: not world.trainer.job_ids)
    last = world.events("j0")[-1]
    assert last["kind"] == "failed" and last["data"]["code"] == "adapter_too_large"
    share = int(1.5 * world.pages) * world.pool.page_bytes
    assert f"your share of the server's is {share}" in last["message"] and "smaller rank" in last["message"]


def test_without_shares_a_lone_tenant_has_the_whole_pool(tmp_path):
    world = World(tmp_path, share=None)
    world.until(lambda: len(world.placed) == 3)
    assert world.limit is None and not world.trainer.waits
    world.until(lambda: not world.trainer.job_ids)


def test_shares_count_copies_only_where_there_is_a_limit():
    shares = Shares(100, 100)
    shares.hold("a", 30)
    assert not shares.limits
    shares.note("a", TenantShare(adapters=0.5))
    assert shares.limits["a"] == TenantLimit(None, 20)
    shares.hold("a", 30)
    assert shares.limits["a"].adapter_pages == 0, "one adapter of its requests may still be in use"
    shares.hold("a", -60)
    assert shares.limits["a"].adapter_pages == 50 == shares.adapter_pages("a")
    shares.note("a", TenantShare())
    assert not shares.limits
