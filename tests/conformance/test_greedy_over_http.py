"""Greedy tokens and log-probabilities over HTTP equal transformers' `generate` with PEFT, whatever shares the batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from http_actions import create_job, greedy, iterations, job_step, newest_iteration, upload_adapter, upload_rows
from live_server import LiveServer
from peft_oracle import (
    assert_greedy_equal,
    generate,
    next_token_logits,
    oracle_model,
    prompt,
    save_adapter,
    training_rows,
)  # fmt: skip
from tiny_models import save_tiny_model

# Fused projections (phi3), sliding beside full layers (gemma3), what comes after the head (granite, cohere).
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "phi3", "granite", "cohere"]
RANKS = (4, 9)
TOKENS = 24


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_equal_generate_with_other_requests_adapters_and_a_job_beside(architecture, tmp_path):
    torch.set_num_threads(1)
    folder = save_tiny_model(tmp_path / "tiny", architecture)
    adapters = {f"rank-{r}": save_adapter(tmp_path / f"rank-{r}", architecture, r, seed=r) for r in RANKS}
    models = {"tiny": oracle_model(folder), **{name: oracle_model(folder, path) for name, path in adapters.items()}}
    asked = [(name, prompt(5 + 7 * i, i)) for i, name in enumerate([*models] * 3)]
    with LiveServer(folder, tmp_path / "data", train_window=16, slo_itl_ms=100) as server:
        client = server.openai()
        versions = {upload_adapter(server, name, path)["digest"] for name, path in adapters.items()}
        job = create_job(client, upload_rows(client, training_rows(64)), r=5, alpha=10, epochs=50)
        server.until(lambda: job_step(client, job.id) >= 1)
        before = newest_iteration(server)
        together = threading.Barrier(len(asked))

        def ask(model: str, ids: list[int]):
            together.wait(100)
            return greedy(client, model, ids, TOKENS).choices[0]

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, *zip(*asked, strict=True)))
        shared = [it for it in iterations(server, before) if it["tokens"]["decode"] >= 3]
        client.fine_tuning.jobs.cancel(job.id)
    for kind in ("train_forward", "train_backward"):
        mixed = [it for it in shared if it["tokens"][kind] and {*versions, f"job:{job.id}"} <= {*it["adapters"]}]
        assert mixed, f"no iteration had {kind} of the job and decoded for both adapters"
    for (name, ids), answer in zip(asked, answers, strict=True):
        got = answer.token_ids
        if got != generate(models[name], ids, TOKENS):
            assert_greedy_equal(models[name], ids, got)
        expected = torch.log_softmax(next_token_logits(models[name], ids, got), -1)
        for row, token, logprob in zip(expected, got, answer.logprobs.token_logprobs, strict=True):
            assert abs(logprob - float(row[token])) <= 1e-4
    assert len({tuple(generate(model, asked[0][1], TOKENS)) for model in models.values()}) == 3, "adapters do nothing"
