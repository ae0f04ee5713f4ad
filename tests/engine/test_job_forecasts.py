"""What an engine's jobs still have to run, told while they run."""

from __future__ import annotations

import torch
from engine_process import write_job
from peft_oracle import training_rows
from stepped_engine import DIGEST, SteppedEngine

from coserve.scheduler.forecast import JobWork
from coserve.server.engine.job_forecasts import reports

torch.set_num_threads(1)


def test_rows_leave_a_jobs_work_when_they_enter_a_sweep_and_forecasts_shrink_to_nothing(tmp_path):
    rows = training_rows(24, 0)
    write_job(tmp_path, "a", DIGEST, rows)
    write_job(tmp_path, "b", DIGEST, training_rows(24, 1), priority="low")
    world = SteppedEngine(tmp_path, itl=0.01)
    scheduler, trainer = world.engine._scheduler, world.trainer

    def opened(name: str) -> JobWork:
        """Before any of its rows is in a sweep."""
        trainer.start(name)
        world.until(lambda: name in {work.job_id for work in trainer.works()})
        return next(work for work in trainer.works() if work.job_id == name)

    first, other = opened("a"), opened("b")
    assert (first.priority, other.priority) == ("normal", "low")
    assert first.step.layers == world.model.layer_count
    seen: list[tuple[int, float]] = []

    def look() -> bool:
        told = {
            one.job_id: one for one in reports(scheduler.forecast(trainer.works(), trainer.states()), trainer.waits)
        }
        if "a" in told:
            left = {work.job_id: work.rows for work in trainer.works()}["a"]
            seen.append((left, told["a"].seconds))
            assert told["a"].tokens_per_second > 0.0
        return "a" not in trainer.job_ids

    world.until(look)
    lefts = [left for left, _ in seen]
    assert lefts == sorted(lefts, reverse=True), "what has run is never counted again, not while a step is reported"
    assert first.rows == sum(len(ids) for ids, _ in rows) >= lefts[0] and lefts[-1] == 0
    assert seen[-1][1] < 0.2 * seen[0][1]
