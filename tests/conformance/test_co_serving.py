"""The first promises over HTTP, with the official client: one process generates and trains at once, exactly."""

from __future__ import annotations

import threading

import pytest
import torch
from http_actions import (
    EXACT,
    adapter_tensors,
    assert_same_logits,
    create_job,
    download_adapter,
    every_iteration,
    greedy,
    iterations,
    job_step,
    metrics,
    newest_iteration,
    succeeded,
    upload_adapter,
    upload_rows,
    wait_idle,
)
from live_server import LiveServer
from peft import LoraConfig
from peft_oracle import (
    assert_greedy_equal,
    distance,
    oracle_model,
    peft_loop,
    prompt,
    save_adapter,
    training_rows,
)  # fmt: skip
from tiny_models import save_tiny_model

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "gemma3_text")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("server") / "data"
    with LiveServer(folder, data, train_window=16, slo_itl_ms=100) as live:
        yield live


@pytest.fixture(scope="module")
def client(server):
    with server.openai(max_retries=0, timeout=150) as client:
        yield client


@pytest.fixture(scope="module")
def reference(folder):
    """Rows, and PEFT's tensors before and after a loop over them."""
    rows = training_rows(8 * STEPS)
    return rows, *peft_loop(folder, rows, r=4, alpha=8, seed=3, step_rows=8, steps=STEPS)


class Streams(threading.Thread):
    """Keeps one stream of the base model open after the other until it is told to stop."""

    def __init__(self, client) -> None:
        super().__init__(daemon=True)
        self._client, self._over = client, threading.Event()
        self.texts: list[list[int]] = []
        self.errors: list[Exception] = []

    def run(self) -> None:
        try:
            while not self._over.is_set():
                reply = self._client.completions.create(
                    model="tiny", prompt=prompt(12, 1), max_tokens=100, temperature=0, stream=True,
                    extra_body=EXACT,
                )  # fmt: skip
                self.texts.append([t for chunk in reply for c in chunk.choices for t in c.token_ids or []])
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self.errors.append(error)

    def finish(self) -> None:
        self._over.set()
        self.join(150)
        assert not self.errors, self.errors
        assert self.texts


@pytest.fixture
def streams(server):
    running = Streams(server.openai())
    running.start()
    yield running
    running.finish()


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (4, 2), (2, 4)])
def test_a_job_over_http_equals_peft_and_adamw(
    server, client, folder, reference, streams, tmp_path, batch, accumulation
):
    rows, initial, expected = reference
    before = newest_iteration(server)
    job = create_job(
        client, upload_rows(client, rows), r=4, alpha=8, batch=batch, gradient_accumulation_steps=accumulation
    )
    job = succeeded(server, client, job.id)
    kinds = [it["tokens"] for it in iterations(server, before)]  # streams go on: they push the job's out of the log
    adapter = download_adapter(server, job.fine_tuned_model, tmp_path)
    assert distance(adapter_tensors(adapter), initial, expected) <= 1e-3
    assert LoraConfig.from_pretrained(adapter).lora_alpha == 8
    assert job.trained_tokens == sum(len(ids) for ids, _ in rows)
    assert any(t["decode"] and t["train_forward"] for t in kinds)
    assert any(t["decode"] and t["train_backward"] for t in kinds)

    # The download is a stock PEFT adapter with the same logits, and it is what the server now serves.
    assert_same_logits(client, job.fine_tuned_model, prompt(40, 9), folder, adapter, 1e-3)
    ids = prompt(20, 9)
    answer = greedy(client, job.fine_tuned_model, ids, 12)
    assert_greedy_equal(oracle_model(folder, adapter), ids, answer.choices[0].token_ids)


def test_two_jobs_and_a_third_that_is_cancelled_midway_equal_their_solo_runs(server, client, folder, tmp_path):
    files = {rank: upload_rows(client, training_rows(64, seed=rank)) for rank in (3, 17, 5)}

    def start(rank: int, epochs: int = 1):
        return create_job(client, files[rank], r=rank, alpha=2 * rank, epochs=epochs)

    def result(job, name: str):
        model = succeeded(server, client, job.id).fine_tuned_model
        return model, download_adapter(server, model, tmp_path / name)

    alone = {rank: adapter_tensors(result(start(rank), f"alone-{rank}")[1]) for rank in (3, 17)}
    before = newest_iteration(server)
    third = start(5, epochs=50)
    server.until(lambda: job_step(client, third.id) >= 1)
    both = {rank: start(rank) for rank in (3, 17)}
    server.until(lambda: all(job_step(client, job.id) >= 1 for job in both.values()))
    assert client.fine_tuning.jobs.cancel(third.id).status == "cancelled"
    assert all(client.fine_tuning.jobs.retrieve(job.id).status == "running" for job in both.values()), "too late"
    for rank, job in both.items():
        model, adapter = result(job, f"together-{rank}")
        initial, _ = peft_loop(folder, [], r=rank, alpha=2 * rank, seed=3, step_rows=8, steps=0)
        assert distance(adapter_tensors(adapter), initial, alone[rank]) <= 1e-3
        assert LoraConfig.from_pretrained(adapter).lora_alpha == 2 * rank
        assert_same_logits(client, model, prompt(40, rank), folder, adapter, 1e-3)
    names = {f"job:{job.id}" for job in (third, *both.values())}
    met = [it for it in iterations(server, before) if len(names.intersection(it["adapters"])) > 1]
    assert met, "no two of them shared an iteration"


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch_of_twelve(server, client, top_p):
    def sample(ids: list[int], tokens: int, seed: int, **options):
        return client.completions.create(
            model="tiny", prompt=ids, max_tokens=tokens, temperature=0.9, top_p=top_p, seed=seed, extra_body=EXACT,
            **options,
        )  # fmt: skip

    ids = prompt(20, 3)
    alone = sample(ids, 24, seed=7).choices[0].token_ids
    assert sample(ids, 24, seed=8).choices[0].token_ids != alone
    before = newest_iteration(server)
    with sample(prompt(9, 4), 400, seed=1, n=11, stream=True) as others:
        assert next(iter(others)).choices
        together = sample(ids, 24, seed=7).choices[0].token_ids
    assert together == alone
    batches = [it["tokens"]["decode"] for it in iterations(server, before)]
    assert batches.count(12) >= 12, "they were not in one batch"


def test_the_token_ledger_closes(server, client):
    """What iterations ran is what requests and jobs were told, also with several choices and stop strings."""
    before = wait_idle(server)
    sampled_before = sampled(server)
    rows = training_rows(24)
    job_id = create_job(client, upload_rows(client, rows), r=4, alpha=8).id
    usages, sequences = [], 0

    def ask(prompts, n: int = 1, **options):
        nonlocal sequences
        answer = client.completions.create(
            model="tiny", prompt=prompts, n=n, **{"max_tokens": 20, "temperature": 0, "extra_body": EXACT, **options}
        )
        usages.append(answer.usage)
        sequences += len(answer.choices)
        return answer

    for i in range(6):
        ask(prompt(40, 60 + i % 2))
    ask(prompt(70, 70), n=3, temperature=1, seed=5)
    ask([prompt(33, 71), prompt(50, 72), prompt(50, 72)], n=2)
    whole = ask(prompt(30, 73), max_tokens=60).choices[0]
    delivered = sum(usage.completion_tokens for usage in usages)
    assert sampled(server) - sampled_before == delivered, "what was sampled was delivered"
    assert sum(usage.prompt_tokens_details.cached_tokens for usage in usages) >= 4 * 32

    stop = whole.text[len(whole.text) // 2 :][:3]
    for _ in range(4):
        cut = ask(prompt(30, 73), max_tokens=60, stop=stop)
        assert cut.choices[0].finish_reason == "stop" and cut.choices[0].text == whole.text[: whole.text.index(stop)]
        given = cut.choices[0].token_ids
        assert given == whole.token_ids[: len(given)] and cut.usage.completion_tokens == len(given) < 60
    ask(prompt(45, 74), max_tokens=0, echo=True)  # one token is sampled that nobody asked for
    job = succeeded(server, client, job_id)

    def sums() -> dict[str, float]:
        found = [it["tokens"] for it in every_iteration(server, before)]
        return {kind: sum(tokens[kind] for tokens in found) for kind in found[0]}

    # a sequence that a stop string has ended runs on until the engine hears of it
    server.until(lambda: sums()["decode"] == sampled(server) - sampled_before - sequences, 60)
    total = sums()
    assert total["prefill"] == sum(usage.prompt_tokens_details.model_extra["computed_tokens"] for usage in usages)
    assert sampled(server) - sampled_before - sum(usage.completion_tokens for usage in usages) >= 1
    assert total["train_forward"] == pytest.approx(job.trained_tokens)
    assert total["train_backward"] == pytest.approx(job.trained_tokens)
    assert total["head"] == sum(sum(label != -100 for label in labels[1:]) for _, labels in rows)


def sampled(server) -> float:
    """Tokens that the engine has given the gateway, delivered or not."""
    return metrics(server).get('coserve_generation_tokens_total{kind="sampled"}', 0)


def test_base_outputs_are_the_same_before_during_and_after(server, client, folder, streams, tmp_path):
    ids = prompt(30, 4)

    def base() -> tuple[list[int], list[float]]:
        choice = greedy(client, "tiny", ids, 24).choices[0]
        return choice.token_ids, choice.logprobs.token_logprobs

    before = base()
    assert_greedy_equal(oracle_model(folder), ids, before[0])
    job = create_job(client, upload_rows(client, training_rows(80)), r=16, alpha=32)
    seen = []
    while client.fine_tuning.jobs.retrieve(job.id).status not in ("succeeded", "failed"):
        seen.append(base())
    succeeded(server, client, job.id)
    for i in range(50):
        upload_adapter(server, f"many-{i}", save_adapter(tmp_path / f"many-{i}", "gemma3_text", 2 + i % 5, i))
        client.completions.create(model=f"many-{i}", prompt=prompt(5, i), max_tokens=1)
    for tokens, logprobs in [*seen, base()]:
        assert tokens == before[0]
        assert max(abs(a - b) for a, b in zip(logprobs, before[1], strict=True)) <= 1e-4


def test_a_published_version_serves_the_next_request_and_old_streams_keep_theirs(server, client, folder, tmp_path):
    ids = prompt(48, 6)
    versions = [save_adapter(tmp_path / f"v{i}", "gemma3_text", 4, seed=20 + i) for i in range(2)]
    upload_adapter(server, "moving", versions[0])
    old = client.completions.create(
        model="moving", prompt=ids, max_tokens=120, temperature=0, stream=True, extra_body=EXACT
    )
    first = next(iter(old))
    upload_adapter(server, "moving", versions[1])
    new = greedy(client, "moving", ids, 20)
    tokens = [t for chunk in [first, *old] for c in chunk.choices for t in c.token_ids or []]
    assert new.usage.prompt_tokens_details.cached_tokens == 0
    assert len(tokens) == 120
    assert_greedy_equal(oracle_model(folder, versions[0]), ids, tokens)
    assert_greedy_equal(oracle_model(folder, versions[1]), ids, new.choices[0].token_ids)


def test_prefix_hits_never_cross_a_salt_or_a_version(server, client, tmp_path):
    upload_adapter(server, "fixed", save_adapter(tmp_path / "fixed", "gemma3_text", 4, seed=30))
    ids = prompt(50, 31)
    seen = []
    for model, salt in (("tiny", "a"), ("tiny", "a"), ("tiny", "b"), ("fixed", "a"), ("fixed", "a")):
        answer = client.completions.create(
            model=model, prompt=ids, max_tokens=12, temperature=0, extra_body={**EXACT, "cache_salt": salt}
        )
        seen.append((answer.usage.prompt_tokens_details.cached_tokens, tuple(answer.choices[0].token_ids)))
    assert [cached for cached, _ in seen] == [0, 48, 0, 0, 48]
    assert len({tokens for _, tokens in seen[:3]}) == len({tokens for _, tokens in seen[3:]}) == 1
    assert seen[0][1] != seen[3][1]


def test_two_tenants_with_an_adapter_of_the_same_name(server, folder, tmp_path):
    with server.http() as http:
        keys = [
            http.post("/v1/organization/api_keys", json={"tenant": tenant, "name": tenant}).json()["key"]
            for tenant in ("north", "south")
        ]
    ids = prompt(64, 8)
    answers, adapters = [], []
    for i, key in enumerate(keys):
        version = save_adapter(tmp_path / f"t{i}", "gemma3_text", 4, seed=40 + i)
        adapters.append(upload_adapter(server, "same", version, key)["id"])
        for model in ("tiny", "same"):
            reply = greedy(server.openai(key), model, ids, 16)
            assert reply.usage.prompt_tokens_details.cached_tokens == 0  # the other tenant's prefix is not ours
        assert_greedy_equal(oracle_model(folder, version), ids, reply.choices[0].token_ids)
        answers.append(reply.choices[0].logprobs.token_logprobs)
    assert max(abs(a - b) for a, b in zip(*answers, strict=True)) > 0.01
    unknown = adapters[0][:-4] + "zzzz"
    with server.http(keys[1]) as http:
        foreign, missing = (http.get(f"/v1/adapters/{name}") for name in (adapters[0], unknown))
    assert foreign.status_code == missing.status_code == 404
    assert foreign.text.replace(adapters[0], "ID") == missing.text.replace(unknown, "ID")
