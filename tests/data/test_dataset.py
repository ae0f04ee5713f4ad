"""A whole data set: the tokens file that the engine reads, or the faults, by line, that keep it from being one."""

import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from chat_templates import save_chat_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from coserve.server.data.dataset import Stopped, prepare_dataset
from coserve.server.data.formats import RowEncoder
from coserve.server.data.jsonl import read_rows
from coserve.server.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_chat_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(content, **options):
        source, scratch = tmp_path / "data.jsonl", tmp_path / "tmp"
        scratch.mkdir(exist_ok=True)
        (tmp_path / "job" / "tokens" / "train.safetensors").unlink(missing_ok=True)
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
        encoder = RowEncoder(tokenizer, tokenizer.vocab_size, options.pop("loss_on", "assistant"))
        options = {"max_model_len": 100, "scratch": scratch, **options}
        report = prepare_dataset(source, tmp_path / "job" / "tokens" / "train.safetensors", encoder, **options)
        assert os.listdir(scratch) == []
        written = tmp_path / "job" / "tokens" / "train.safetensors"
        assert written.exists() == report.ok
        return report, load_file(written) if report.ok else None

    return run


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_the_file_that_the_engine_reads(prepare, tokenizer):
    rows = [
        {"input_ids": list(range(n, n + length)), "labels": [-100, *range(n + 1, n + length)]}
        for n, length in [(3, 2), (10, 7), (50, 3)]
    ]
    report, arrays = prepare(lines(*rows))
    assert (report.format, report.rows, report.tokens, report.loss_tokens, report.longest) == ("tokens", 3, 12, 9, 7)
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "input_ids": (np.dtype("int32"), (12,)),
        "labels": (np.dtype("int32"), (12,)),
        "offsets": (np.dtype("int64"), (4,)),
    }
    assert arrays["offsets"].tolist() == [0, 2, 9, 12]
    for number, row in enumerate(rows):
        part = slice(arrays["offsets"][number], arrays["offsets"][number + 1])
        assert arrays["input_ids"][part].tolist() == row["input_ids"]
        assert arrays["labels"][part].tolist() == row["labels"]


def test_every_fault_names_its_line_and_the_first_twenty_are_shown(prepare):
    content = (
        lines({"text": "good"}, {"text": 5}) + "\n" + "{'text': 1}\n" + '{"text": NaN}\n' + '{"text": "\\ud800"}\n'
    )
    content += "[" * 100_000 + "\n" + "[1]\nnull\n3\n" + '{"text": "a\\u0000"}\n' + '{"n": ' + "9" * 5000 + "}\n"
    content += lines(*[{"prompt": "x"}] * 30) + "\n\n  \n"
    report, _ = prepare(content)
    assert not report.ok and report.fault_count == 41 and len(report.faults) == 20
    assert [fault.line for fault in report.faults] == [2, *range(3, 22)]
    assert all(fault.reason and fault.remedy for fault in report.faults)
    message = report.error_message()
    assert "Line 2, field text: not a string." in message and message.endswith("… and 21 more.")


def test_a_key_that_stands_twice_is_a_fault_not_a_guess(prepare):
    report, _ = prepare(lines({"text": "good"}) + '{"text": "a", "text": "b"}\n{"x": {"\\ud800": 1, "\\ud800": 2}}\n')
    assert [(fault.line, fault.field) for fault in report.faults] == [(2, "text"), (3, "\\ud800")]
    assert "twice" in report.error_message()


def test_a_row_of_a_million_brackets_is_not_parsed(prepare):
    started = time.perf_counter()
    report, _ = prepare(
        lines({"text": "good", "note": "[" * 50_000}) + '{"text": "a", "x": [' + "[]," * 1_000_000 + "[]]}\n"
    )
    assert time.perf_counter() - started < 20
    assert [(fault.line, fault.field) for fault in report.faults] == [(2, None)] and "32768" in report.error_message()


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n\r\n", "\ufeff", "\ufeff\n"])
def test_files_without_rows(prepare, content):
    report, _ = prepare(content)
    assert report.fault_count == 1 and report.faults[0].line == 0


def test_bytes_that_are_no_text_and_a_byte_order_mark(prepare):
    report, _ = prepare(b'{"text": "ok"}\n{"text": "\xff\xfe"}\n\x00\x00\n')
    assert [fault.line for fault in report.faults] == [2, 3] and "UTF-8" in report.faults[0].reason
    report, _ = prepare(b'\xef\xbb\xbf{"text": "ok"}\r\n{"text": "fine"}')
    assert report.ok and report.rows == 2


def test_one_format_in_a_file(prepare):
    report, _ = prepare(lines({"text": "a b"}, {"prompt": "a", "completion": "b"}, {"text": "c d"}))
    assert [fault.line for fault in report.faults] == [2] and "completion row in a file of text rows" in str(
        report.faults[0]
    )


def test_rows_without_anything_to_learn(prepare):
    rows = [
        {"input_ids": [1], "labels": [1]},
        {"input_ids": [1, 2], "labels": [1, -100]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    report, _ = prepare(lines(*rows))
    assert [fault.line for fault in report.faults] == [1, 2] and "bears loss" in report.faults[0].reason


def test_long_rows_fail_unless_they_may_be_cut(prepare):
    long = {"input_ids": [5] * 30, "labels": [5] * 30}
    fits = {"input_ids": [5] * 20, "labels": [5] * 20}
    report, _ = prepare(lines(fits, long), max_model_len=20)
    assert [fault.line for fault in report.faults] == [2]
    assert (
        "30 tokens" in report.faults[0].reason
        and "20" in report.faults[0].reason
        and "max_length" in report.faults[0].remedy
    )
    report, arrays = prepare(lines(fits, long, long), max_model_len=50, max_length=20)
    assert report.ok and report.cut_rows == 2 and report.tokens == 60 and report.longest == 20
    assert arrays["offsets"].tolist() == [0, 20, 40, 60]
    report, _ = prepare(lines(long), max_model_len=20, max_length=1000)
    assert report.ok and report.tokens == 20, "the context bounds max_length"
    late = {"input_ids": [5] * 30, "labels": [-100] * 29 + [5]}
    report, _ = prepare(lines(late), max_length=20)
    assert "nothing to learn is left" in report.faults[0].reason


def test_endless_lines_are_skipped_not_kept(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b'{"text": "' + b"a" * 50_000 + b'"}\n{"text": "b"}\n' + b"c" * 30_000)
    with path.open("rb") as stream:
        found = list(read_rows(stream, longest_line=1000))
    assert [line for line, _ in found] == [1, 2, 3]
    assert "longer" in found[0][1].reason and found[1][1] == {"text": "b"} and "longer" in found[2][1].reason


def test_it_can_be_stopped_and_leaves_nothing(prepare, tmp_path):
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        prepare(lines(*[{"text": "a b"}] * 10), should_stop=lambda: next(asked))
    assert os.listdir(tmp_path / "tmp") == [] and not (tmp_path / "job").exists()


def test_memory_grows_with_rows_not_with_tokens(prepare, tokenizer, tmp_path):
    row = {"input_ids": [5] * 2000, "labels": [5] * 2000}
    prepare(lines(row) * 2, max_model_len=2000)
    (tmp_path / "data.jsonl").write_text(lines(row) * 250)  # 4 MB of arrays
    encoder = RowEncoder(tokenizer, tokenizer.vocab_size)
    tracemalloc.start()
    try:
        target = tmp_path / "large.safetensors"
        report = prepare_dataset(tmp_path / "data.jsonl", target, encoder, max_model_len=2000, scratch=tmp_path / "tmp")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.tokens == 500_000 and target.stat().st_size > 4_000_000
    assert peak < 2_500_000, peak


KEYS = ["messages", "role", "content", "weight", "text", "prompt", "completion", "input_ids", "labels", "type", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, min_size=1, max_size=4),
    max_leaves=12,
)


@pytest.mark.security
@settings(
    max_examples=120, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.lists(JSON | st.binary(max_size=30), max_size=5))
def test_no_content_breaks_it(prepare, rows):
    encoded = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=True).encode() for row in rows]
    report, arrays = prepare(b"\n".join(encoded))
    if report.ok:
        assert arrays["offsets"][-1] == len(arrays["input_ids"]) == len(arrays["labels"])
        assert (np.diff(arrays["offsets"]) >= 2).all()
    else:
        assert report.error_message()
