"""What a job says it still has to run, held against what it then runs."""

from __future__ import annotations

import pytest
from training_jobs import make_job, open_job, synthetic_gradients


@pytest.mark.parametrize("evaluation", [{}, {"eval_every": 3}, {"eval_every": 3, "max_steps": 6}])
def test_what_is_left_is_what_will_run(tmp_path, evaluation):
    make_job(tmp_path, rows=8, valid=5, n_epochs=2, **evaluation)
    job = open_job(tmp_path)
    told, ran = [(job.work_left(None), None)], []
    while (batch := job.next_batch()) is not None:
        told.append((job.work_left(batch), batch))
        ran.append((batch.kind, batch.tokens, batch.loss_tokens))
        if batch.kind == "eval":
            job.finish_eval(batch, 1.0, 1)
        else:
            job.finish_train(batch, synthetic_gradients(job, batch), 1.0, 1)
        if job.state == "running":
            assert job.work_left(batch) == told[-1][0], "a report does not change what is left beyond its batch"
    steps = sum(kind == "train" for kind, *_ in ran)
    tokens = {kind: sum(count for k, count, _ in ran if k == kind) for kind in ("train", "eval")}
    first = told[0][0]
    # Rows of 2 to 9 tokens: a part of an epoch has some others than the average.
    assert first.tokens == pytest.approx(tokens["train"], abs=0.1 if steps == 8 else 8.0)
    assert first.step_tokens == 11.0 and first.eval_tokens == tokens["eval"] > 0
    assert first.bearing == (44 - 8) / 44 and first.eval_bearing == 2 / 3
    for at, (outlook, _) in enumerate(told[1:], start=1):
        after = ran[at:]
        assert outlook.tokens == 11.0 * sum(kind == "train" for kind, *_ in after)
        assert outlook.eval_tokens == pytest.approx(sum(count for kind, count, _ in after if kind == "eval"), abs=1e-9)


def test_a_job_that_goes_on_says_what_its_checkpoint_has_left(tmp_path):
    make_job(tmp_path, rows=8, n_epochs=2)
    job = open_job(tmp_path)
    batch = job.next_batch()
    job.finish_train(batch, synthetic_gradients(job, batch), 1.0, 1)
    job.pause()
    job.close()
    again = open_job(tmp_path)
    assert again.work_left(None).tokens == 7 * 11.0 and again.work_left(None).eval_tokens == 0.0
