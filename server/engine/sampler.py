"""From rows of raw logits to tokens, each row by its own request's parameters.

A row's token is a function of its logits, its request and its position alone. Random numbers come from a
counter (`random_stream.uniform`), and the inverse of the distribution is taken over tokens in ascending id,
not in order of probability: rounding differences between batch sizes then move the borders between tokens by
their own size only, while two nearly equal probabilities that swap places would change the token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.transfer import integers, to_device
from coserve.server.engine.random_stream import uniform
from coserve.server.wire.messages import SamplingParams

# Below this a temperature is greedy: a float32 quotient would be all zeros and infinities anyway.
_GREEDY_TEMPERATURE = 1e-5
_CHUNK = 512  # vocabulary entries summed together before the running sum


@dataclass(slots=True)
class SamplingRow:
    """What one sequence's next token depends on beside its logits."""

    params: SamplingParams
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()  # generated so far; may be the caller's growing list
    _prompt_seen: Tensor | None = field(default=None, repr=False)

    @property
    def greedy(self) -> bool:
        # top_k 1 keeps one token, whatever the temperature.
        return self.params.temperature < _GREEDY_TEMPERATURE or self.params.top_k == 1

    @property
    def filtered(self) -> bool:
        p = self.params
        return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0

    @property
    def edits_logits(self) -> bool:
        p = self.params
        return bool(
            p.logit_bias
            or p.repetition_penalty != 1.0
            or p.presence_penalty
            or p.frequency_penalty
            or (p.stop_token_ids and len(self.output_ids) < p.min_tokens)
        )

    def prompt_seen(self) -> Tensor:
        """The distinct prompt ids, int64, sorted; computed once."""
        if self._prompt_seen is None:
            self._prompt_seen = torch.tensor(self.prompt_ids, dtype=torch.int64).unique()
        return self._prompt_seen


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: float | None = None  # None: not asked for
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """One token a row.

    The order of steps is logit bias, penalties, `min_tokens`, temperature, min-p, top-k, top-p, each on what
    the one before left. Log-probabilities are of the raw logits, before all of them.

    Args:
        logits: [R, V], float32 (anything else is converted; float64 stays). Not written to.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sequences")
    if not rows:
        return []
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    tokens: list[int] = [0] * len(rows)
    greedy, plain = [], []
    edited: dict[int, Tensor] = {}
    for index, row in enumerate(rows):
        if row.edits_logits:
            edited[index] = edit_logits(logits[index], row)
        if row.greedy:
            greedy.append(index)
        elif row.filtered:
            tokens[index] = _sample_filtered(edited.get(index, logits[index]), row)
        else:
            plain.append(index)
    for indices, choose in ((greedy, _argmax), (plain, _sample_plain)):
        if indices:
            stacked = _stack(logits, indices, edited)
            for index, token in zip(indices, choose(stacked, [rows[i] for i in indices]), strict=True):
                tokens[index] = token
    return _with_logprobs(logits, rows, tokens)


def chosen_on_device(row: SamplingRow) -> bool:
    """Whether `choose` can take this row: greedy or temperature alone, no edits and no log-probabilities."""
    plain = row.greedy or not row.filtered
    return plain and not row.edits_logits and row.params.logprobs is None


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The tokens of `sample`, int64 [R] on the logits' device, without waiting for it. See `chosen_on_device`."""
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    tokens = logits.argmax(-1)
    drawn = [index for index, row in enumerate(rows) if not row.greedy]
    if drawn:
        index = integers(drawn, logits.device, torch.int64)
        some = logits if len(drawn) == len(rows) else logits.index_select(0, index)
        tokens.index_copy_(0, index, _sample_by_chunks(some, [rows[i] for i in drawn]))
    return tokens


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Sampled]:
    """Log-softmax of the raw logits [R, V] at one token a row, with the `top` best alternatives."""
    if not len(token_ids):
        return []
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    total = torch.logsumexp(logits, -1, keepdim=True)
    chosen = (logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]) - total)[:, 0].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if top > 0:
        values, ids = logits.topk(min(top, logits.shape[1]), dim=-1)
        pairs = zip(ids.tolist(), (values - total).tolist(), strict=True)
        tops = [tuple(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
    return [Sampled(*entry) for entry in zip(token_ids, chosen, tops, strict=True)]


def edit_logits(row_logits: Tensor, row: SamplingRow) -> Tensor:
    """A copy of logits [V] after bias, penalties and `min_tokens`.

    Repetition (Keskar et al., CTRL, 2019): a logit of a token of prompt or output is divided by the penalty
    where it is positive, else multiplied. Presence and frequency (OpenAI): minus presence, minus frequency
    times the count, for tokens of the output only.
    """
    params, size, device = row.params, row_logits.shape[0], row_logits.device
    edited = row_logits.clone()

    def inside(ids: Tensor) -> Tensor:  # a tokenizer may know more ids than the head has rows
        return ids[(ids >= 0) & (ids < size)].to(device)

    if params.logit_bias:
        bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < size}
        index = torch.tensor(list(bias), dtype=torch.int64, device=device)
        edited[index] += torch.tensor(list(bias.values()), dtype=edited.dtype, device=device)
    output, counts = torch.tensor(list(row.output_ids), dtype=torch.int64).unique(return_counts=True)
    if params.repetition_penalty != 1.0:
        seen = inside(torch.cat([row.prompt_seen(), output]).unique())
        values = edited[seen]
        penalty = params.repetition_penalty
        edited[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        known = (output >= 0) & (output < size)
        minus = params.frequency_penalty * counts[known].to(edited.dtype) + params.presence_penalty
        edited[output[known].to(device)] -= minus.to(device)
    if len(row.output_ids) < params.min_tokens and params.stop_token_ids:
        edited[inside(torch.tensor(params.stop_token_ids))] = -math.inf
    return edited


def _stack(logits: Tensor, indices: list[int], edited: dict[int, Tensor]) -> Tensor:
    """Rows `indices` of the logits, edited ones in place of raw ones, without a copy where all rows are raw."""
    if len(indices) == logits.shape[0] and not edited:
        return logits
    stacked = logits[indices]
    for position, index in enumerate(indices):
        if index in edited:
            stacked[position] = edited[index]
    return stacked


def _argmax(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The first of the largest logits, on [R, V]."""
    count, size = logits.shape
    if logits.device.type != "cpu" or size % _CHUNK:
        return logits.argmax(-1).tolist()
    # On a CPU torch finds a maximum ten times faster than its place (16 rows of 262,144: 0.15 against 1.3 ms).
    chunks = logits.reshape(count, -1, _CHUNK)
    chunk = chunks.amax(-1).argmax(-1)
    inside = chunks[torch.arange(count), chunk].argmax(-1)
    return (chunk * _CHUNK + inside).tolist()


def _relative(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits - best) / temperature, at most 0, in a new tensor. NaN counts as -inf, +inf as the largest."""
    best = logits.amax(-1, keepdim=True)
    # On CUDA without asking: finite values come through unchanged.
    if logits.is_cuda or not bool(best.isfinite().all()):
        logits = logits.nan_to_num(nan=-math.inf, posinf=torch.finfo(logits.dtype).max, neginf=-math.inf)
        best = logits.amax(-1, keepdim=True)
        logits = torch.where(best.isfinite(), logits, 0.0)  # a row of nothing else: every token is as good
        best = logits.amax(-1, keepdim=True)
    return (logits - best).div_(temperature)


def _sample_plain(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Temperature alone, on [R, V]: no sorting; a running sum over chunks, then inside one chunk."""
    # On a CPU a row at a time stays in the cache (16 rows of 262,144: 6 against 18 ms); a GPU wants all at once.
    at_once = 1 if logits.device.type == "cpu" else len(rows)
    return [
        token
        for start in range(0, len(rows), at_once)
        for token in _sample_by_chunks(logits[start : start + at_once], rows[start : start + at_once]).tolist()
    ]


def _sample_by_chunks(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    temperatures = to_device(torch.tensor([row.params.temperature for row in rows], dtype=logits.dtype), logits.device)
    weights = _relative(logits, temperatures[:, None]).exp_()
    count, size = weights.shape
    if size % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, -size % _CHUNK))
    padded = weights.view(count, -1, _CHUNK)
    borders = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    targets = to_device(torch.tensor([_uniform(row) for row in rows], dtype=torch.float64), logits.device)
    targets = targets[:, None] * borders[:, -1:]
    chunk = _search_sums(borders, targets)
    below = torch.where(chunk > 0, borders.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = padded[torch.arange(count, device=logits.device), chunk[:, 0]].double()
    within = _search_sums(inside.cumsum(-1), targets - below)
    return (chunk * _CHUNK + within)[:, 0].clamp_(max=size - 1)


def _search_sums(running: Tensor, targets: Tensor) -> Tensor:
    """First entry whose running sum [R, N] passes targets [R, 1]; so never one of weight zero."""
    # Rounding may put a target at, or a hair past, the last sum: the last entry with any weight takes it.
    targets = torch.minimum(targets, torch.nextafter(running[:, -1:], running.new_zeros(())))
    return torch.searchsorted(running, targets, right=True).clamp_(max=running.shape[1] - 1)


def _sample_filtered(logits: Tensor, row: SamplingRow) -> int:
    """min-p, top-k and top-p on [V]; each keeps a set of the most likely tokens, ties in favour of lower ids."""
    scores = _relative(logits, row.params.temperature)
    kept = _kept_ids(scores, row.params)
    running = scores[kept].double().exp_().cumsum(0)[None]
    found = _search_sums(running, _uniform(row) * running[:, -1:])
    return int(kept[found[0, 0]])


def _kept_ids(scores: Tensor, params: SamplingParams) -> Tensor:
    """The ids that the filters keep, ascending.

    Every filter keeps the first so many in order of score, so all three come down to one count, and the ids
    follow from the score at that place: values are sorted, never ids with them (0.6 against 20 ms at 262,144).
    """
    size = scores.shape[0]
    floor = math.log(params.min_p) if params.min_p > 0 else -math.inf
    if params.top_k == 0 and params.top_p >= 1.0:
        return (scores >= floor).nonzero()[:, 0]
    whole: float | None = None
    if params.top_k > 0:
        ordered = scores.topk(min(params.top_k, size)).values
        ordered = ordered[ordered >= floor]
    else:
        if params.top_p < 1.0 and not params.min_p:
            whole = float(scores.exp().sum(dtype=torch.float64))
            # What is left out weighs less than (1 - top_p) of the whole, so the nucleus needs none of it.
            floor = math.log(max(1.0 - params.top_p, 1e-30) * whole / size) - 1e-3
        ordered = _descending(scores[scores >= min(floor, 0.0)])
    count = ordered.shape[0]
    if params.top_p < 1.0 and count > 1:
        running = ordered.double().exp_().cumsum(0)
        target = params.top_p * (float(running[-1]) if whole is None else whole)
        count = min(count, int(torch.searchsorted(running, target)) + 1)
    last = ordered[count - 1]
    kept = (scores >= last).nonzero()[:, 0]
    surplus = kept.shape[0] - count
    if surplus:  # equal scores at the border: the higher ids go
        tied = (scores[kept] == last).nonzero()[:, 0]
        stays = torch.ones_like(kept, dtype=torch.bool)
        stays[tied[-surplus:]] = False
        kept = kept[stays]
    return kept


def _descending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        # numpy's vectorised sort of values alone is 35 times faster than torch's at 262,144.
        return torch.from_numpy(np.sort(values.numpy())).flip(0)
    return values.sort(descending=True).values


def _uniform(row: SamplingRow) -> float:
    return uniform(row.params.seed, row.params.choice, len(row.output_ids))


def _with_logprobs(logits: Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]) -> list[Sampled]:
    result = [Sampled(token) for token in tokens]
    wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    if wanted:
        indices = list(wanted)
        part = logits if len(indices) == logits.shape[0] else logits[indices]
        entries = token_logprobs(part, [tokens[i] for i in indices], max(wanted.values()))
        for index, entry in zip(indices, entries, strict=True):
            result[index] = Sampled(entry.token_id, entry.logprob, entry.top[: wanted[index]])
    return result
