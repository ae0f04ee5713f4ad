"""Greedy tokens and log-probabilities of a real engine equal transformers and PEFT, whatever shares the batch."""

from __future__ import annotations

import time

import pytest
import torch
from engine_process import EngineProcess, write_job
from peft_oracle import assert_greedy_equal, oracle_model, prompt, save_adapter
from tiny_models import save_tiny_model

from coserve.server.wire.messages import Abort, AdapterRef, CheckAdapter, StartJob, Stats

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "phi3", "granite", "cohere"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def check_adapter(engine: EngineProcess, path: str) -> AdapterRef:
    engine.send(CheckAdapter(99, path))
    found = []
    engine.pump(lambda m: getattr(m, "call_id", None) == 99 and not found.append(m))
    assert found[0].error is None, found[0].error
    return AdapterRef(found[0].digest, path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_with_adapters_and_a_job_beside(architecture, tmp_path):
    folder = save_tiny_model(tmp_path / "model", architecture)
    for i, rank in enumerate((4, 9)):
        save_adapter(tmp_path / f"adapter{i}", architecture, rank, seed=i)
    oracle = oracle_model(folder)
    with EngineProcess(folder, tmp_path, slo_itl_ms=100, train_window=16, kv_memory=2**20) as engine:
        rows = [(prompt(20, 100 + i), prompt(20, 100 + i)) for i in range(64)]
        write_job(tmp_path, "job", engine.ready.base_digest, rows, n_epochs=50)
        refs = [None, *(check_adapter(engine, f"adapter{i}") for i in range(2))]
        engine.send(StartJob("job", "t"))
        engine.wait_job("job", ("step",))
        requests = {f"r{i}": (prompt(5 + 7 * i, i), refs[i % 3]) for i in range(9)}
        for name, (ids, ref) in requests.items():
            engine.submit(name, ids, adapter=ref, max_tokens=24, logprobs=2)
        got = dict(zip(requests, engine.finish(*requests), strict=True))
        iterations = engine.iterations()
        entries = {name: [e for m in engine.tokens[name] for e in m.logprobs] for name in requests}
    assert any(it["tokens"]["decode"] and it["tokens"]["train_forward"] for it in iterations)
    for i, ref in enumerate(refs):
        model = oracle if ref is None else oracle_model(folder, tmp_path / f"adapter{i - 1}")
        for name, (ids, used) in requests.items():
            if used is ref:
                assert_greedy_equal(model, ids, got[name])
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids + got[name]]), use_cache=False).logits[0]
                expected = torch.log_softmax(logits[len(ids) - 1 : -1].float(), -1)
                for row, entry, token in zip(expected, entries[name], got[name], strict=True):
                    assert entry.token_id == token
                    assert abs(entry.logprob - float(row[token])) <= 1e-4
                    assert len(entry.top) == 2


def test_a_cache_too_small_for_all_and_a_pool_for_two_of_twenty(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    for i in range(20):
        save_adapter(tmp_path / f"adapter{i}", "llama", 4, seed=i)
    row_bytes = 64 * 8 * 4  # a page: 8 rank rows of the hidden size
    with EngineProcess(
        folder, tmp_path, kv_memory=90 * 16 * 3 * 2 * 2 * 16 * 4, adapter_memory=80 * row_bytes
    ) as engine:
        assert engine.ready.kv_blocks <= 90
        refs = [check_adapter(engine, f"adapter{i}") for i in range(20)]
        long = {f"long{i}": prompt(150, i) for i in range(12)}
        for name, ids in long.items():
            engine.submit(name, ids, max_tokens=60)
        short = {f"short{i}": prompt(10, 50 + i) for i in range(20)}
        for i, (name, ids) in enumerate(short.items()):
            engine.submit(name, ids, adapter=refs[i], max_tokens=12)
        got = dict(zip([*long, *short], engine.finish(*long, *short, timeout=120), strict=True))
    oracle = oracle_model(folder)
    for name, ids in long.items():
        assert len(got[name]) == 60
        assert_greedy_equal(oracle, ids, got[name])
    for i in (0, 7, 19):
        model = oracle_model(folder, tmp_path / f"adapter{i}")
        assert_greedy_equal(model, short[f"short{i}"], got[f"short{i}"])


def test_prefix_hits_are_counted_and_never_cross_salt_or_version(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    save_adapter(tmp_path / "adapter0", "llama", 4, seed=0)
    with EngineProcess(folder, tmp_path) as engine:
        ref = check_adapter(engine, "adapter0")
        ids = prompt(50, 1)
        cached = []
        for i, (adapter, salt) in enumerate([(None, "a"), (None, "a"), (None, "b"), (ref, "a"), (ref, "a")]):
            engine.submit(f"r{i}", ids, adapter=adapter, salt=salt)
            engine.finish(f"r{i}")
            cached.append(engine.tokens[f"r{i}"][0].cached_tokens)
        assert cached == [0, 48, 0, 0, 48]
        same = [[t for m in engine.tokens[f"r{i}"] for t in m.token_ids] for i in range(5)]
        assert same[0] == same[1] == same[2]
        assert same[3] == same[4] != same[0]
        iterations = engine.iterations()
    prefilled = sum(it["tokens"]["prefill"] for it in iterations)
    decoded = sum(it["tokens"]["decode"] for it in iterations)
    assert prefilled == 5 * 50 - sum(cached)
    assert decoded == sum(len(tokens) - 1 for tokens in same)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch_of_twelve(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen3")
    options = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 24}
    with EngineProcess(folder, tmp_path) as engine:
        alone = engine.generate(prompt(20, 3), seed=7, **options)
        for i in range(12):
            engine.submit(f"b{i}", prompt(20, 3) if i == 5 else prompt(9 + i, i), seed=7 if i == 5 else i, **options)
        together = engine.finish(*[f"b{i}" for i in range(12)])
    assert together[5] == alone


def test_a_hundred_aborts_give_every_block_back(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    with EngineProcess(folder, tmp_path, kv_memory=2**21, max_running=16) as engine:
        blocks = engine.ready.kv_blocks
        for i in range(100):
            engine.submit(f"r{i}", prompt(100, i), max_tokens=300)
        wanted = {i: i % 4 for i in range(100)}
        for i, tokens in wanted.items():  # some queued, some in prefill, some in decode
            if i < 16 and tokens:
                engine.pump(lambda m, i=i: getattr(m, "request_id", "") == f"r{i}")
            engine.send(Abort(f"r{i}"))
        aborted = time.monotonic()

        def free_again(message):
            gauges = message.gauges if isinstance(message, Stats) else {}
            return gauges.get("coserve_kv_blocks_free") == blocks and gauges["coserve_requests_waiting"] == 0

        engine.pump(free_again, timeout=5)
        assert time.monotonic() - aborted <= 2.5  # Stats come once a second
        assert engine.generate(prompt(20, 0), max_tokens=4)
