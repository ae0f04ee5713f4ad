"""Sampling against an oracle's softmax, penalties against their formulas, seeds alone and in a batch."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from coserve.server.engine.random_stream import uniform
from coserve.server.engine.sampler import SamplingRow, edit_logits, sample, token_logprobs
from coserve.server.wire.messages import SamplingParams

torch.set_num_threads(1)
VOCABULARY = 24
DRAWS = 4000


def logits_of(seed, vocabulary=VOCABULARY, rows=None, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (vocabulary,) if rows is None else (rows, vocabulary)
    return torch.randn(*shape, generator=generator) * scale


def params(**values):
    return SamplingParams(**{"max_tokens": 100, "seed": 1, **values})


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The kept set and its probabilities, token by token in float64 (min-p, then top-k, then top-p)."""
    scores = [value / temperature for value in logits.double().tolist()]
    probability = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-probability[i], i))
    order = [i for i in order if probability[i] >= min_p * probability[order[0]]]
    if top_k:
        order = order[:top_k]
    mass, kept, reached = sum(probability[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        reached += probability[i]
        if top_p < 1.0 and reached >= top_p * mass:
            break
    total = sum(probability[i] for i in kept)
    return {i: probability[i] / total for i in sorted(kept)}


def draw(logits, count=DRAWS, **values):
    """Tokens of `count` rows that differ in their seed only."""
    rows = [SamplingRow(params(**{**values, "seed": seed})) for seed in range(count)]
    return [s.token_id for s in sample(logits.expand(count, -1), rows)]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 2.0, "top_k": 100},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.8, "top_p": 0.95, "min_p": 0.01},
    ],
)
def test_draws_follow_the_oracle(settings):
    logits = logits_of(11)
    want = oracle(logits, **settings)
    counts = Counter(draw(logits, **settings))
    assert set(counts) <= set(want), "a token outside the kept set was drawn"
    likely = [token for token, p in want.items() if p * DRAWS >= 5]
    rest = [token for token in want if token not in likely]
    observed = [counts[t] for t in likely] + [sum(counts[t] for t in rest)] * bool(rest)
    expected = [want[t] * DRAWS for t in likely] + [sum(want[t] for t in rest) * DRAWS] * bool(rest)
    if len(observed) > 1:
        assert chisquare(observed, expected).pvalue > 1e-4


def test_the_positions_of_one_stream_follow_the_oracle_too():
    logits = logits_of(12)
    want = oracle(logits)
    tokens = [
        sample(logits[None], [SamplingRow(params(seed=7), (), range(position))])[0].token_id for position in range(3000)
    ]
    observed = [tokens.count(token) for token in want]
    likely = [i for i, token in enumerate(want) if want[token] * 3000 >= 5]
    rest = 3000 - sum(observed[i] for i in likely)
    expected = [list(want.values())[i] * 3000 for i in likely]
    assert chisquare([*(observed[i] for i in likely), rest], [*expected, 3000 - sum(expected)]).pvalue > 1e-4


@pytest.mark.parametrize("vocabulary", [1, 2, 511, 512, 513, 1300])
def test_vocabularies_of_any_size(vocabulary):
    logits = logits_of(vocabulary, vocabulary, scale=0.5)
    for settings in ({}, {"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.2}):
        tokens = draw(logits, 300, **settings)
        assert all(0 <= token < vocabulary for token in tokens)
        assert set(tokens) <= set(oracle(logits, **settings))
    if vocabulary > 1000:
        assert max(draw(logits, 300)) > 1024, "the last chunk is never reached"


def test_equal_scores_at_the_border_go_to_the_lower_ids():
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    assert set(draw(logits, 400, top_k=2)) == {1, 2}
    assert set(draw(logits, 400, top_p=0.5)) == set(oracle(logits, top_p=0.5))
    assert set(draw(logits, 50, top_k=1)) == {1}


@pytest.mark.parametrize("vocabulary", [1000, 2048])
def test_greedy_is_the_first_best_token(vocabulary):
    logits = logits_of(3, vocabulary, rows=6)
    logits[1:4, 700] = logits[1:4, 900] = 50.0  # equals in one chunk,
    logits[2, 100] = 50.0  # in two chunks,
    logits[3, -1] = 60.0  # the last token of all,
    logits[5] = -math.inf  # and nothing but minus infinity
    got = [s.token_id for s in sample(logits, [SamplingRow(params(temperature=0))] * 6)]
    assert got == logits.argmax(-1).tolist()
    assert got[1:4] == [700, 100, vocabulary - 1]
    tied = torch.tensor([[1.0, 4.0, 4.0]])
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"min_p": 1.0}):
        chosen = {sample(tied, [SamplingRow(params(**{**settings, "seed": s}))])[0].token_id for s in range(20)}
        assert chosen <= ({1, 2} if "min_p" in settings else {1}), settings


MIXED = [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8}, {"repetition_penalty": 1.4}, {"frequency_penalty": 0.7},
    {"presence_penalty": -0.5, "temperature": 0.0}, {"logit_bias": {3: 5.0}}, {"logprobs": 2},
    {"min_tokens": 20, "stop_token_ids": (4, 5)},
]  # fmt: skip


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(5)
    steps = [torch.randn(len(MIXED), 700, generator=generator) * 2 for _ in range(12)]

    def row(i, output):
        return SamplingRow(params(**{"seed": 100 + i, **MIXED[i]}), [1, 2, 3, 50], output)

    alone = []
    for i in range(len(MIXED)):
        output: list[int] = []
        for logits in steps:
            output.append(sample(logits[i : i + 1], [row(i, output)])[0].token_id)
        alone.append(output)
    batch: list[list[int]] = [[] for _ in MIXED]
    order = [7, 0, 11, 3, 2, 9, 1, 10, 5, 4, 8, 6]
    for logits in steps:
        for i, sampled in zip(order, sample(logits[order], [row(i, batch[i]) for i in order]), strict=True):
            batch[i].append(sampled.token_id)
    assert batch == alone
    assert len({tuple(tokens) for tokens in alone}) == len(MIXED)


def test_rounding_noise_hardly_ever_changes_a_token():
    logits = logits_of(8, 4000, rows=500)
    noisy = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    rows = [SamplingRow(params(seed=s)) for s in range(500)]
    changed = sum(a != b for a, b in zip(sample(logits, rows), sample(noisy, rows), strict=True))
    assert changed <= 1


def test_seed_choice_and_position_are_all_part_of_the_key():
    assert len({uniform(s, c, p) for s in range(8) for c in range(8) for p in range(8)}) == 512
    assert uniform(-1, 0, 0) == uniform((1 << 64) - 1, 0, 0)
    draws = [uniform(5, 0, p) for p in range(20000)]
    assert all(0.0 < u < 1.0 for u in draws)
    assert chisquare([sum(int(u * 20) == k for u in draws) for k in range(20)]).pvalue > 1e-4
    pairs = Counter((int(a * 5), int(b * 5)) for a, b in itertools.pairwise(draws))
    assert chisquare(list(pairs.values())).pvalue > 1e-4


def test_penalties_by_the_formula():
    logits = logits_of(21)
    prompt, output = [1, 2, 2, 3, 9], [3, 4, 4, 4, 2]
    row = SamplingRow(
        params(repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={4: 2.0, 11: -100.0}),
        prompt, output,
    )  # fmt: skip
    got = edit_logits(logits, row)
    for token in range(VOCABULARY):
        want = logits[token].item() + {4: 2.0, 11: -100.0}.get(token, 0.0)
        if token in prompt or token in output:
            want = want / 1.7 if want > 0 else want * 1.7
        if token in output:
            want -= 0.4 + 0.3 * output.count(token)
        assert got[token].item() == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_the_raw_logits_are_left_alone():
    logits = logits_of(2, 600, rows=len(MIXED))
    before = logits.clone()
    sample(logits, [SamplingRow(params(**values), [1, 5], [7, 7]) for values in MIXED])
    assert torch.equal(before, logits)


def test_filters_and_repetition_agree_with_transformers():
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = logits_of(31, 200)
    ids = torch.tensor([[3, 5, 5, 8, 190]])
    row = SamplingRow(params(repetition_penalty=1.3), [3, 5], [5, 8, 190])
    want = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[None].clone())[0]
    assert torch.allclose(edit_logits(logits, row), want, rtol=1e-6, atol=1e-6)
    scores = TemperatureLogitsWarper(1.8)(ids, logits[None].clone())
    for settings, warper in (
        ({"top_k": 13}, TopKLogitsWarper(13)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.15}, MinPLogitsWarper(0.15)),
    ):
        kept = set(warper(ids, scores.clone())[0].isfinite().nonzero()[:, 0].tolist())
        assert kept == set(oracle(logits, temperature=1.8, **settings))
        assert set(draw(logits, 3000, temperature=1.8, **settings)) <= kept


def test_logit_bias_of_a_hundred_decides():
    logits = logits_of(4)
    assert set(draw(logits, 200, logit_bias={17: 100.0})) == {17}
    best = int(logits.argmax())
    assert best not in draw(logits, 500, logit_bias={best: -100.0})
    outside = {VOCABULARY + 5: 100.0, -1: 100.0}
    assert draw(logits, 50, logit_bias=outside) == draw(logits, 50)


def test_min_tokens_holds_stop_tokens_back_until_then():
    logits = torch.full((1, VOCABULARY), -5.0)
    logits[0, 6], logits[0, 7] = 20.0, 10.0
    values = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (6, 999)}
    for length, want in ((0, 7), (2, 7), (3, 6), (9, 6)):
        assert sample(logits, [SamplingRow(params(**values), (), [1] * length)])[0].token_id == want


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-6}, {"temperature": 1e-4}, {"temperature": 100.0}, {"top_p": 1e-9}, {"top_p": 0.999999},
        {"min_p": 1.0}, {"top_k": 1_000_000}, {"temperature": 1e-4, "top_p": 0.5}, {"temperature": 2.0, "top_p": 1e-9},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 1e-3},
        {"logit_bias": dict.fromkeys(range(VOCABULARY), -100.0)},
        {"min_tokens": 5, "stop_token_ids": tuple(range(VOCABULARY))},
    ],
)  # fmt: skip
def test_extreme_values_still_give_a_token(values):
    for scale in (1e-3, 1.0, 1e4, 1e30):
        logits = logits_of(6, rows=3, scale=scale)
        for sampled in sample(logits, [SamplingRow(params(logprobs=3, **values), [1], [2, 2])] * 3):
            assert 0 <= sampled.token_id < VOCABULARY
            assert math.isfinite(sampled.logprob)
            assert all(math.isfinite(value) for _, value in sampled.top)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_damaged_rows_neither_raise_nor_touch_their_neighbours(settings):
    logits = logits_of(9, 600, rows=5)
    clean = sample(logits, [SamplingRow(params(seed=s, **settings)) for s in range(5)])
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, 5] = math.inf
    logits[3, ::2] = -math.inf
    got = sample(logits, [SamplingRow(params(seed=s, **settings)) for s in range(5)])
    assert all(0 <= s.token_id < 600 for s in got)
    assert got[2].token_id == 5
    assert got[3].token_id % 2 == 1
    assert got[4] == clean[4]


def test_logprobs_are_of_the_raw_logits():
    logits = logits_of(13, 900, rows=3)
    want = torch.log_softmax(logits.double(), -1)
    rows = [
        SamplingRow(params(temperature=0.3, logprobs=4, logit_bias={8: 50.0})),
        SamplingRow(params()),
        SamplingRow(params(temperature=0.0, logprobs=0)),
    ]
    got = sample(logits, rows)
    assert got[0].token_id == 8
    assert got[0].logprob == pytest.approx(want[0, 8].item(), abs=1e-4)
    best = want[0].topk(4)
    assert [token for token, _ in got[0].top] == best.indices.tolist()
    assert [value for _, value in got[0].top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert (got[1].logprob, got[1].top) == (None, ())
    assert got[2].top == () and got[2].logprob == pytest.approx(want[2].max().item(), abs=1e-4)
    prompt = token_logprobs(logits, [5, 6, 7], 2)
    assert [entry.logprob for entry in prompt] == pytest.approx([want[i, 5 + i].item() for i in range(3)], abs=1e-4)
    assert all(len(entry.top) == 2 for entry in prompt)


def test_bfloat16_and_float64_logits_are_taken():
    logits = logits_of(14, rows=2)
    rows = [SamplingRow(params(seed=s)) for s in range(2)]
    assert sample(logits.double(), rows) == sample(logits, rows)
    assert len(sample(logits.bfloat16(), rows)) == 2


def test_a_wrong_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sample(logits_of(1, rows=2), [SamplingRow(params())])
    assert sample(torch.zeros(0, 5), []) == []
