"""Jobs: one transition table, one job a submission, and engine events that count exactly once."""

import asyncio
import itertools

import pytest

from coserve.server.store.adapters import NewVersion
from coserve.server.store.checkpoints import NewCheckpoint
from coserve.server.store.errors import EventGap, IdempotencyConflict, InvalidTransition, UnknownCursor
from coserve.server.store.files import NewFile
from coserve.server.store.job_events import NewEvent
from coserve.server.store.job_progress import JobEffects
from coserve.server.store.jobs import JobChange, NewJob
from coserve.server.store.submissions import Submission
from coserve.server.store.transitions import FINAL, NEXT

STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
PATHS = {  # how to bring a new job to each status
    "validating_files": (),
    "queued": ("queued",),
    "running": ("queued", "running"),
    "paused": ("queued", "running", "paused"),
    "succeeded": ("queued", "running", "succeeded"),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
}


def new_job(**fields):
    given = {"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 1}, "adapter": {"r": 8}, "training": {}}
    return NewJob("tiny", "file-x", 42, **{**given, **fields})


def make(store, tenant, status="validating_files", **fields):
    async def steps():
        job, _ = await store.jobs.create(tenant, new_job(**fields))
        for next_status in PATHS[status]:
            job = await store.jobs.change(tenant, job.id, JobChange(status=next_status))
        return job

    return asyncio.run(steps())


ALLOWED = {
    ("validating_files", "queued"), ("validating_files", "failed"), ("validating_files", "cancelled"),
    ("queued", "running"), ("queued", "paused"), ("queued", "failed"), ("queued", "cancelled"),
    ("running", "queued"), ("running", "paused"), ("running", "succeeded"), ("running", "failed"),
    ("running", "cancelled"),
    ("paused", "queued"), ("paused", "running"), ("paused", "failed"), ("paused", "cancelled"),
}  # fmt: skip


def test_every_pair_of_statuses(store):
    assert set(NEXT) == set(STATUSES)
    for current, wanted in itertools.product(STATUSES, STATUSES):
        job = make(store, store.a, current)
        change = JobChange(status=wanted, events=[NewEvent("told")])
        if current == wanted:
            assert asyncio.run(store.jobs.change(store.a, job.id, change)) == job
            told = False
        elif (current, wanted) in ALLOWED:
            after = asyncio.run(store.jobs.change(store.a, job.id, change))
            assert after.status == wanted
            assert (after.finished_at is not None) == (wanted in FINAL)
            told = True
        else:
            with pytest.raises(InvalidTransition, match=f"is {current} and cannot become {wanted}"):
                asyncio.run(store.jobs.change(store.a, job.id, change))
            assert asyncio.run(store.jobs.get(store.a, job.id)) == job
            told = False
        assert len(asyncio.run(store.events.list(store.a, job.id)).items) == told


def test_fields_come_back_as_they_went_in(store):
    job = make(store, store.a, suffix="süß", metadata={"k": "v\u0000"}, spec={"deep": [1, {"x": None}]})
    again = asyncio.run(store.jobs.get(store.a, job.id))
    assert again == job
    assert (job.suffix, job.metadata, job.spec) == ("süß", {"k": "v\u0000"}, {"deep": [1, {"x": None}]})
    assert (job.created_at, job.seed, job.result_files, job.error) == (1_700_000_000, 42, (), None)


def test_requests_of_the_tenant_are_kept_and_a_cancel_wins(store):
    job = make(store, store.a, "running")

    def change(**fields):
        return asyncio.run(store.jobs.change(store.a, job.id, JobChange(**fields)))

    assert change(requested="pause").requested == "pause"
    assert change(requested="cancel").requested == "cancel"
    assert change(requested="pause").requested == "cancel"
    assert change(status="cancelled").requested is None
    with pytest.raises(InvalidTransition, match="cannot become paused"):
        change(requested="pause")


def test_lists_page_newest_first_and_filter_by_metadata(store):
    made = [make(store, store.a, metadata={"n": str(n % 2), "all": "yes"}).id for n in range(5)]
    make(store, store.b, metadata={"n": "0"})

    def listed(**options):
        page = asyncio.run(store.jobs.list(store.a, **options))
        return [job.id for job in page.items], page.has_more

    assert listed(limit=2) == ([made[4], made[3]], True)
    assert listed(limit=2, after=made[3]) == ([made[2], made[1]], True)
    assert listed(limit=2, after=made[1]) == ([made[0]], False)
    assert listed(metadata={"n": "0", "all": "yes"}) == ([made[4], made[2], made[0]], False)
    assert listed(metadata={"n": "0", "all": "no"}) == ([], False)
    foreign = make(store, store.b).id
    for unknown in (foreign, "ftjob-nothing"):
        with pytest.raises(UnknownCursor, match=unknown):
            listed(after=unknown)


def test_the_same_submission_is_the_same_job(store, clock):
    def create(tenant=store.a, **fields):
        submission = Submission(**{"body_hash": "h1", "key_id": "key_1", **fields})
        job, fresh = asyncio.run(store.jobs.create(tenant, new_job(), submission=submission))
        return job.id, fresh

    first, fresh = create(key="k")
    assert fresh
    assert create(key="k") == (first, False)
    with pytest.raises(IdempotencyConflict):
        create(key="k", body_hash="h2")
    assert create(tenant=store.b, key="k")[1], "another tenant's key is another key"

    plain, _ = create()
    assert create()[1], "no key and no retry: a second job"
    newest = create()[0]
    assert create(is_retry=True) == (newest, False)
    assert create(is_retry=True, body_hash="h2")[1]
    assert create(is_retry=True, key_id="key_2")[1]
    clock.now += 601
    assert create(is_retry=True)[1], "after ten minutes it is a new request"
    assert plain != first


def test_two_equal_submissions_at_once_make_one_job(store):
    async def race():
        submission = Submission("h", "key_1", key="same")
        return await asyncio.gather(*(store.jobs.create(store.a, new_job(), submission=submission) for _ in range(8)))

    results = asyncio.run(race())
    assert len({job.id for job, _ in results}) == 1
    assert sum(fresh for _, fresh in results) == 1


def apply(store, job, seq, **effects):
    return asyncio.run(store.progress.apply(job.tenant, job.id, seq, JobEffects(**effects)))


def checkpoint(step, **fields):
    return NewCheckpoint(step, f"ft:tiny:alpha::x:ckpt-step-{step}", f"{step:064x}", f"jobs/x/{step}", **fields)


def test_an_engine_event_counts_once_with_all_it_brings(store):
    job = make(store, store.a, "running", fine_tuned_model="ft:tiny:alpha::x")
    change = JobChange(progress={"step": 1}, trained_tokens=10, events=[NewEvent("Step 1/2", type="metrics")])
    effects = {"change": change, "checkpoint": checkpoint(1, metrics={"loss": 1.5})}
    first = apply(store, job, 1, **effects)
    assert first.fresh and first.job.last_seq == 1 and first.job.progress == {"step": 1}
    again = apply(store, job, 1, **effects)
    assert not again.fresh and again.job == first.job
    assert len(asyncio.run(store.events.list(store.a, job.id)).items) == 1
    (row,) = asyncio.run(store.checkpoints.list(store.a, job.id)).items
    assert (row.step, row.metrics, row.resumable) == (1, {"loss": 1.5}, True)


def test_an_event_out_of_order_is_refused(store):
    job = make(store, store.a, "running")
    with pytest.raises(EventGap) as caught:
        apply(store, job, 2)
    assert (caught.value.expected, caught.value.got) == (1, 2)


def test_a_refused_event_leaves_nothing(store):
    job = make(store, store.a, "cancelled")
    with pytest.raises(InvalidTransition):
        apply(
            store, job, 1, checkpoint=checkpoint(1), version=NewVersion("d" * 64, "adapters/x", 8, 1),
            result_file=NewFile(1, "r.csv", "fine-tune-results", "0" * 64),
            change=JobChange(status="succeeded", events=[NewEvent("told")]),
        )  # fmt: skip
    assert asyncio.run(store.jobs.get(store.a, job.id)) == job
    assert asyncio.run(store.events.list(store.a, job.id)).items == ()
    assert asyncio.run(store.checkpoints.list(store.a, job.id)).items == ()
    assert asyncio.run(store.adapters.list(store.a)).items == ()
    assert asyncio.run(store.files.list(store.a)).items == ()


def test_the_end_of_a_job_is_one_commit(store):
    model = "ft:tiny:alpha::x"
    job = make(store, store.a, "running", fine_tuned_model=model)
    done = apply(
        store, job, 1, version=NewVersion("d" * 64, "adapters/x", 8, 100, job.id, 20), result_file_id="file-result",
        result_file=NewFile(5, "step_metrics.csv", "fine-tune-results", "0" * 64),
        change=JobChange(status="succeeded", trained_tokens=99, progress={"step": 20}),
    )  # fmt: skip
    assert (done.job.status, done.job.result_files, done.job.trained_tokens) == ("succeeded", ("file-result",), 99)
    assert asyncio.run(store.files.get(store.a, "file-result")).purpose == "fine-tune-results"
    resolved = asyncio.run(store.models.resolve(store.a, model))
    assert (resolved.digest, resolved.adapter_id, resolved.job_id) == ("d" * 64, done.job.adapter_id, job.id)
    assert done.version.number == 1


def test_versions_of_a_running_job_go_to_one_adapter(store):
    job = make(store, store.a, "running", fine_tuned_model="ft:tiny:alpha::x")
    first = apply(store, job, 1, version=NewVersion("1" * 64, "p1", 8, 1, job.id, 5))
    second = apply(store, job, 2, version=NewVersion("2" * 64, "p2", 8, 1, job.id, 10))
    assert first.version.adapter_id == second.version.adapter_id == second.job.adapter_id
    assert (first.version.number, second.version.number) == (1, 2)
    same = apply(store, job, 3, version=NewVersion("2" * 64, "p2", 8, 1, job.id, 10))
    assert same.version == second.version


def test_an_adapter_deleted_under_its_job_comes_back_with_the_next_version(store):
    job = make(store, store.a, "running", fine_tuned_model="ft:tiny:alpha::x")
    first = apply(store, job, 1, version=NewVersion("1" * 64, "p1", 8, 1), adapter_name="mine")
    asyncio.run(store.adapters.delete(store.a, first.job.adapter_id))
    taken, _ = asyncio.run(store.adapters.publish(store.a, "mine", NewVersion("9" * 64, "p9", 8, 1)))
    second = apply(store, job, 2, version=NewVersion("2" * 64, "p2", 8, 1), adapter_name="mine")
    assert second.version.adapter_id == first.version.adapter_id != taken.id
    assert asyncio.run(store.models.resolve(store.a, "mine")).digest == "9" * 64
    assert asyncio.run(store.models.resolve(store.a, "ft:tiny:alpha::x")).digest == "2" * 64


def test_a_deleted_version_that_is_published_again_is_live_and_its_folder_is_kept(store):
    job = make(store, store.a, "running", fine_tuned_model="ft:tiny:alpha::x")
    same = NewVersion("1" * 64, "p1", 8, 1)
    first = apply(store, job, 1, version=same)
    asyncio.run(store.adapters.delete(store.a, first.job.adapter_id))
    assert [one.path for one in asyncio.run(store.adapters.all_deleted_versions_for_recovery())] == ["p1"]
    second = apply(store, job, 2, version=same)
    assert second.version.number == 2
    assert asyncio.run(store.models.resolve(store.a, "ft:tiny:alpha::x")).digest == "1" * 64
    assert asyncio.run(store.adapters.all_deleted_versions_for_recovery()) == ()


def test_a_pruned_checkpoint_is_not_there_and_a_repeated_step_replaces_its_row(store):
    job = make(store, store.a, "running")
    for seq, step in enumerate((1, 2, 3), start=1):
        apply(store, job, seq, checkpoint=checkpoint(step))
    before = asyncio.run(store.checkpoints.list(store.a, job.id)).items
    assert [one.step for one in before] == [3, 2, 1]
    apply(store, job, 4, pruned_step=1)
    apply(store, job, 5, checkpoint=NewCheckpoint(3, before[0].model_id, "f" * 64, "elsewhere"))
    after = asyncio.run(store.checkpoints.list(store.a, job.id)).items
    assert [(one.step, one.digest) for one in after] == [(3, "f" * 64), (2, f"{2:064x}")]
    assert after[0].id == before[0].id
    assert asyncio.run(store.models.resolve(store.a, before[2].model_id)) is None
    assert asyncio.run(store.models.resolve(store.a, before[0].model_id)).digest == "f" * 64
    page = asyncio.run(store.checkpoints.list(store.a, job.id, after=before[2].id))
    assert page.items == (), "a pruned one may still be a cursor"


def test_events_page_and_stream_in_both_directions(store):
    job = make(store, store.a, "running")
    for seq in range(1, 6):
        told = [NewEvent(f"m{seq}", data={"n": seq}, created_at=seq)]
        apply(store, job, seq, change=JobChange(events=told))
    page = asyncio.run(store.events.list(store.a, job.id, limit=2))
    assert [event.message for event in page.items] == ["m5", "m4"] and page.has_more
    page = asyncio.run(store.events.list(store.a, job.id, limit=10, after=page.items[-1].id))
    assert [event.message for event in page.items] == ["m3", "m2", "m1"] and not page.has_more
    stream = asyncio.run(store.events.since(store.a, job.id, page.items[-1].position, limit=2))
    assert [(event.message, event.data, event.created_at) for event in stream] == [
        ("m2", {"n": 2}, 2),
        ("m3", {"n": 3}, 3),
    ]
    assert all(event.id.startswith("ftevent-") for event in stream)


def test_recovery_lists_cross_tenants_in_order(store):
    jobs = [
        make(store, tenant, status)
        for tenant, status in [(store.a, "running"), (store.b, "queued"), (store.a, "failed")]
    ]
    found = asyncio.run(store.jobs.all_with_status_for_recovery(["queued", "running"]))
    assert [job.id for job in found] == [jobs[0].id, jobs[1].id]
    assert asyncio.run(store.jobs.find_for_recovery(jobs[1].id)).tenant == store.b
    assert asyncio.run(store.jobs.count(store.a, ["queued", "running"])) == 1
