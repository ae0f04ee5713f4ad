"""The files of a job: its order, its rows and their shuffling, its events, and checkpoints under a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_jobs import BASE_DIGEST, SITES, advance, events, make_job, open_job, write_rows

from coserve.server.training.batches import BatchSource
from coserve.server.training.checkpoint import CheckpointStore
from coserve.server.training.dataset import DatasetError, TokenRows, order, total_steps
from coserve.server.training.events import EventLog, read_events, result_table
from coserve.server.training.spec import SpecError, parse_spec
from coserve.server.training.tensor_file import write_tensors

torch.set_num_threads(1)


# ---------------------------------------------------------------- spec.json


def spec_fields(tmp_path):
    return json.loads((make_job(tmp_path) / "spec.json").read_text())


def test_a_spec_is_read_whole(tmp_path):
    spec = parse_spec(json.dumps(spec_fields(tmp_path)).encode())
    assert spec.adapter.target_modules == "all-linear" and spec.training.betas == (0.9, 0.999)
    assert spec.training.step_rows == 2 and spec.seed == 7


@pytest.mark.parametrize(
    "section, field, value",
    [
        (None, "seed", -1), (None, "seed", "1"), (None, "has_validation", 1), (None, "tenant", ""),
        (None, "surprise", 1), (None, "training", []), ("adapter", "r", 0), ("adapter", "type", "dora"),
        ("adapter", "init", "/etc/passwd"), ("adapter", "init", "adapters/../../x"), ("adapter", "target_modules", []),
        ("training", "learning_rate", -1), ("training", "lr_scheduler", "step"), ("training", "betas", [0.9]),
        ("training", "betas", [0.9, 1.0]), ("training", "batch_size", 0), ("training", "n_epochs", True),
        ("training", "max_steps", 0), ("training", "shuffle", None), ("training", "priority", "high"),
        ("training", "optimizer_hook", "os.system"),
    ],
)  # fmt: skip
def test_a_spec_with_one_bad_field_names_it(tmp_path, section, field, value):
    fields = spec_fields(tmp_path)
    (fields[section] if section else fields)[field] = value
    with pytest.raises(SpecError, match=field):
        parse_spec(json.dumps(fields).encode())


def test_a_spec_that_lacks_a_field_names_it(tmp_path):
    fields = spec_fields(tmp_path)
    del fields["training"]["eps"]
    with pytest.raises(SpecError, match="eps"):
        parse_spec(json.dumps(fields).encode())


# ---------------------------------------------------------------- rows


def test_rows_come_back_as_written(tmp_path):
    rows = [[3, 4, 5], [6], [7, 8]]
    labels = [[-100, 4, 5], [6], [-100, -100]]
    write_rows(tmp_path / "t.safetensors", rows, labels)
    read = TokenRows(tmp_path / "t.safetensors", vocab_size=9)
    assert len(read) == 3
    for index in range(3):
        ids, marks = read.row(index)
        assert ids.tolist() == rows[index] and marks.tolist() == labels[index] and ids.dtype == np.int64


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": torch.tensor([0, 2])}, {"offsets": torch.tensor([0, 2, 2, 3])}, {"offsets": torch.tensor([1, 3])},
        {"offsets": torch.tensor([0, 5, 3])}, {"labels": torch.zeros(2, dtype=torch.int32)},
        {"offsets": torch.tensor([0])},
        {"input_ids": torch.zeros(3, dtype=torch.int64)}, {"extra": torch.zeros(1)},
        {"input_ids": torch.tensor([1, 2, 9], dtype=torch.int32)},
        {"input_ids": torch.tensor([1, -2, 3], dtype=torch.int32)},
        {"labels": torch.tensor([1, 2, -7], dtype=torch.int32)},
    ],
)  # fmt: skip
def test_malformed_rows_are_refused(tmp_path, change):
    tensors = {
        "input_ids": torch.tensor([1, 2, 3], dtype=torch.int32),
        "labels": torch.tensor([-100, 2, 3], dtype=torch.int32),
        "offsets": torch.tensor([0, 3]),
    }
    write_tensors(tmp_path / "good.safetensors", tensors)
    TokenRows(tmp_path / "good.safetensors", vocab_size=9)
    write_tensors(tmp_path / "bad.safetensors", {**tensors, **change})
    with pytest.raises(DatasetError):
        TokenRows(tmp_path / "bad.safetensors", vocab_size=9)


def test_the_order_is_a_permutation_fixed_by_seed_and_epoch():
    first = order(1000, 5, 0, True)
    assert sorted(first) == list(range(1000))
    assert (order(1000, 5, 0, True) == first).all()
    assert not (order(1000, 5, 1, True) == first).all() and not (order(1000, 6, 0, True) == first).all()
    assert order(5, 5, 3, False).tolist() == [0, 1, 2, 3, 4]
    # the very values: another order would change every job that is resumed across an upgrade
    assert order(8, 42, 1, True).tolist() == PINNED_ORDER


PINNED_ORDER = [4, 5, 3, 0, 2, 7, 1, 6]


def test_steps_take_every_row_once_an_epoch_in_a_new_order(tmp_path):
    assert total_steps(10, 4, 2, None) == 6 and total_steps(10, 4, 2, 5) == 5
    folder = make_job(tmp_path, rows=10, batch_size=2, gradient_accumulation_steps=2, n_epochs=2)
    spec = parse_spec((folder / "spec.json").read_bytes())
    source = BatchSource(spec, TokenRows(folder / "tokens" / "train.safetensors"), None)
    assert (source.steps_per_epoch, source.total_steps) == (3, 6)
    epochs = []
    for epoch in range(2):
        batches = [source.train(epoch * 3 + place + 1) for place in range(3)]
        assert [[row.sequence for row in batch.rows] for batch in batches] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]
        epochs.append([row.index for batch in batches for row in batch.rows])
        assert epochs[-1] == order(10, spec.seed, epoch, True).tolist()
    assert epochs[0] != epochs[1]
    assert [row.index for row in source.train(2).rows] == epochs[0][4:8]  # asked for again, out of order


# ---------------------------------------------------------------- events


@pytest.mark.parametrize(
    "torn", [b'{"seq": 3, "kind"', b'{"seq": 3}', b"\x00" * 50, b'{"seq": 9}\n', b"null\n", b"{\n"]
)
def test_a_torn_last_line_is_cut_and_numbering_goes_on(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, clock=lambda: 1.5)
    assert log.append("started", "info", "go", {"total_steps": 2})[0] == 1
    log.append("step", "info", "one", {"step": 1})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(list(read_events(path))) == 2
    log = EventLog(path, clock=lambda: 2.5)
    assert log.seq == 2 and path.read_bytes() == whole
    seq, record = log.append("step", "info", "two", {"step": 2})
    assert seq == 3 and list(read_events(path))[-1] == record
    assert record == {
        "seq": 3,
        "created_at": 2.5,
        "kind": "step",
        "level": "info",
        "message": "two",
        "data": {"step": 2},
    }


def test_values_that_are_no_json_never_reach_the_file(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(ValueError):
        log.append("step", "info", "bad", {"train_loss": float("nan")})
    assert (tmp_path / "events.jsonl").read_bytes() == b""


def test_the_result_table_forgets_what_a_resume_threw_away():
    def event(kind, **data):
        return {"kind": kind, "data": data}

    records = [
        event("started", step=0), event("step", step=1, train_loss=3.0, train_mean_token_accuracy=0.5),
        event("step", step=2, train_loss=9.0), event("step", step=3, train_loss=9.0), event("started", step=1),
        event("step", step=2, train_loss=2.0, train_mean_token_accuracy=0.25, valid_loss=1.5),
    ]  # fmt: skip
    assert result_table(records).splitlines() == [
        "step,train_loss,train_mean_token_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,3.0,0.5,,",
        "2,2.0,0.25,1.5,",
    ]


# ---------------------------------------------------------------- kill -9


def run_in_a_child(data_dir: Path) -> int:
    """Go on with the job in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            advance(open_job(data_dir))
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.faults
def test_a_process_killed_at_any_moment_leaves_a_job_that_ends_in_the_same_bits(tmp_path):
    options = {"rows": 40, "n_epochs": 15, "checkpoint_every": 1, "keep_checkpoints": 2, "publish_every": 3}
    calm = make_job(tmp_path / "calm", **options)
    advance(open_job(tmp_path / "calm"))
    folder = make_job(tmp_path / "killed", **options)
    chance = random.Random(1)
    kills = 0
    for _ in range(12):
        child = run_in_a_child(tmp_path / "killed")
        time.sleep(chance.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        store = CheckpointStore(folder / "checkpoints")
        steps = store.steps()
        if steps:
            assert store.read(steps[-1], SITES, BASE_DIGEST).state.step == steps[-1]  # the newest is always whole
    assert kills >= 6, "the job ended before it could be killed"
    if events(folder)[-1]["kind"] != "finished":
        advance(open_job(tmp_path / "killed"))
    ends = [events(path)[-1]["data"] for path in (calm, folder)]
    assert ends[0] == ends[1]
    assert (calm / "result.csv").read_bytes() == (folder / "result.csv").read_bytes()
    last = ends[0]["path"]
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json", "state.json"):
        assert (tmp_path / "calm" / last / name).read_bytes() == (tmp_path / "killed" / last / name).read_bytes(), name
    announced = {event["data"]["step"] for event in events(folder) if event["kind"] == "checkpoint"}
    published = {event["data"]["step"] for event in events(folder) if event["kind"] == "published"}
    assert announced == set(range(1, 301)) and published == set(range(3, 300, 3))
