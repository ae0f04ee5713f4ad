"""The whole engine on its Triton backend: tokens of transformers and peft, gradients of full-sequence autograd.

Under Triton's interpreter the tensors are the CPU's (see `test_engine_interpreter.py`).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from gradient_oracle import (
    PeftOracle,
    engine_model,
    new_step,
    new_sweep,
    random_rows,
    run_sweep,
    worst_error,
)
from kernel_device import kernel_device
from peft_oracle import assert_greedy_equal, oracle_model, prompt, save_adapter
from stepped_engine import SteppedEngine
from tiny_models import save_tiny_model, tiny_config

from coserve.kernels.dropout import RowKeys, dropout_rows
from coserve.kernels.lora import LIMITS, Family, FamilyLimits, route
from coserve.server.engine import triton_backend
from coserve.server.engine.decode_graphs import DecodeGraphs
from coserve.server.engine.model import BaseModel
from coserve.server.engine.plain_backend import PlainBackend
from coserve.server.engine.pooled_adapter import pool_of
from coserve.server.engine.probe import probe
from coserve.server.engine.triton_backend import TritonBackend
from coserve.server.training.peft.lora import LoraPair

pytestmark = pytest.mark.gpu


def served(architecture: str, backend) -> BaseModel:
    return engine_model(architecture, torch.float32, backend=backend, device=kernel_device())


def in_a_pool(model: BaseModel, *oracles: PeftOracle):
    """The oracles' adapters as training copies of one pool."""
    weights = [{m: LoraPair(a.detach(), b.detach(), o.scaling) for m, (a, b) in o.weights().items()} for o in oracles]
    return pool_of(model, weights)


@pytest.mark.parametrize("architecture,save", [("llama:mini", True), ("gemma3_text:mini", False), ("phi3:mini", True)])
def test_gradients_equal_full_sequence_autograd(architecture, save):
    """Two jobs of ranks 3 and 20, windows that cut sequences, prefixes of more than one window."""
    model = served(architecture, TritonBackend())
    oracles = {name: PeftOracle(architecture, torch.float32, rank, seed=rank) for name, rank in [("a", 3), ("b", 20)]}
    rows = {"a": random_rows([17, 2], 512, seed=1), "b": random_rows([1, 9], 512, seed=2)}
    steps = {}
    for (name, oracle), held in zip(oracles.items(), in_a_pool(model, *oracles.values()), strict=True):
        step = new_step(name, oracle, rows[name])
        step.adapter = held
        steps[name] = (step, rows[name])
    run_sweep(model, new_sweep(model, steps, save=save), [9, 16], 16, [11, 7], layers=1 if save else None)
    for name, (step, own) in steps.items():
        loss, reference = oracles[name].gradients(own)
        assert abs(step.loss_sum / step.loss_tokens - loss) <= 1e-4 * abs(loss)
        step.grads = {site: (a.cpu(), b.cpu()) for site, (a, b) in step.grads.items()}
        assert worst_error(step, reference) <= 1e-4


def test_dropout_is_that_of_the_plain_backend():
    found = []
    oracle = PeftOracle("llama:mini", torch.float32, 4, seed=1)
    rows = random_rows([14], 512, seed=3)
    for backend in (PlainBackend(), TritonBackend()):
        model = served("llama:mini", backend)
        step = new_step("a", oracle, rows)
        step.adapter, step.dropout, step.dropout_key = in_a_pool(model, oracle)[0], 0.3, (5, 1)
        run_sweep(model, new_sweep(model, {"a": (step, rows)}, save=False), [8], 16, [9])
        found.append({site: (a.cpu(), b.cpu()) for site, (a, b) in step.grads.items()})
    plain, step.grads = found
    assert worst_error(step, plain) <= 1e-4
    dropped = dropout_rows(torch.ones(4, 8), 0.3, (5, 1), "x", RowKeys.of([(0, 0, 4)]))
    assert 0 < int((dropped == 0).sum()) < 32  # the rate is not idle


def test_the_probe_passes():
    probe(tiny_config("gemma3_text:mini"), TritonBackend(), kernel_device())


def engine_with_adapters(tmp_path, graphs_of=None, families=None, **adapters: int) -> SteppedEngine:
    for name, rank in adapters.items():
        targets = ["q_proj", "v_proj", "down_proj"] if rank == 5 else "all-linear"
        save_adapter(tmp_path / name, "llama:mini", rank, seed=rank, target_modules=targets)
    return SteppedEngine(
        tmp_path,
        architecture="llama:mini",
        backend=TritonBackend(families),
        device=kernel_device(),
        graphs_of=graphs_of,
        itl=60.0,
    )


def test_greedy_tokens_of_mixed_ranks_in_one_batch(tmp_path, monkeypatch):
    """Base and three adapters, one of them at some modules only; prompts in chunks beside decodes, these in the family
    of launches for small batches. Routing is built once an iteration, whatever the number of layers and adapters."""
    routed, counts = [], []
    monkeypatch.setattr(triton_backend, "route", lambda *args, **how: routed.append(args) or route(*args, **how))

    def done():
        counts.append(len(routed))
        return not len(engine.requests)

    engine = engine_with_adapters(tmp_path, families=LIMITS, a=3, b=20, c=5)
    model = save_tiny_model(tmp_path / "model", "llama:mini")
    wanted = {"base": None, "a": "a", "b": "b", "c": "c"}
    for number, (request, adapter) in enumerate(wanted.items()):
        ref = None if adapter is None else engine.ref(adapter)
        engine.submit(request, prompt(7 + 11 * number, number), ref, max_tokens=4)
    engine.until(done, seconds=120)
    assert max(after - before for before, after in itertools.pairwise(counts)) == 1
    for number, (request, adapter) in enumerate(wanted.items()):
        oracle = oracle_model(model, None if adapter is None else tmp_path / adapter)
        got = engine.tokens(request)
        assert len(got) == 4
        assert_greedy_equal(oracle, prompt(7 + 11 * number, number), got)


def test_other_requests_change_nothing(tmp_path):
    engine = engine_with_adapters(tmp_path, a=3, b=20)
    ids = prompt(12, 1)
    engine.submit("alone", ids, engine.ref("a"), max_tokens=4)
    engine.until(lambda: not len(engine.requests), seconds=120)
    engine.submit("x", prompt(9, 2), None, max_tokens=4)
    engine.submit("y", prompt(9, 2), engine.ref("b"), max_tokens=4)
    engine.submit("among", ids, engine.ref("a"), max_tokens=4)
    engine.until(lambda: not len(engine.requests), seconds=120)
    assert engine.tokens("among") == engine.tokens("alone")
    assert engine.tokens("y") != engine.tokens("x")


def test_decodes_through_fixed_buffers(tmp_path):
    """What a CUDA graph records, replayed: batches of other sizes and adapters come after one another, and a
    sequence's rows are at other places each time, and few rows are for the other family of launches. On CUDA the
    graphs themselves."""
    shapes = []

    def graphs_of(model, cache, pool):
        return DecodeGraphs(model, cache, pool, 64, record if kernel_device().type == "cpu" else None)

    def record(static):
        def replay():
            shapes.append((static.shape.rows, static.shape.rank, static.shape.family))
            return static.run()

        return replay

    engine = engine_with_adapters(tmp_path, graphs_of, FamilyLimits(rows_float32=3), a=3, b=19)
    assert engine.ref("a").digest < engine.ref("b").digest  # once y is done, z's adapter moves to the first place
    model = save_tiny_model(tmp_path / "model", "llama:mini")
    wanted = {"x": (None, 6), "y": ("a", 4), "z": ("b", 5), "y2": ("a", 3), "z2": ("b", 5)}
    for adapter in "ab":  # bring them into the pool, so that all decode together
        engine.submit(adapter, [5], engine.ref(adapter), max_tokens=1)
    engine.until(lambda: not len(engine.requests), seconds=120)
    for number, (request, (adapter, tokens)) in enumerate(wanted.items()):
        ref = None if adapter is None else engine.ref(adapter)
        engine.submit(request, prompt(5 + 6 * number, number), ref, max_tokens=tokens)
    engine.until(lambda: not len(engine.requests), seconds=120)
    for number, (request, (adapter, tokens)) in enumerate(wanted.items()):
        got = engine.tokens(request)
        assert len(got) == tokens
        assert_greedy_equal(oracle_model(model, adapter and tmp_path / adapter), prompt(5 + 6 * number, number), got)
    if kernel_device().type == "cpu":
        assert {(8, 32, Family.GROUPED), (4, 32, Family.PER_ROW), (1, 0, Family.GROUPED)} <= set(shapes)


def test_an_iteration_in_pieces_replays_once(tmp_path):
    """The host reads at an iteration's end, as on CUDA, and a replay overwrites what the one before it said."""
    said, alone = {}, []

    def record(static):
        def replay():
            if static.shape.rows > 1:
                raise RuntimeError("this one is to run in pieces")
            alone.append(static.shape)
            hidden, logits = static.run()
            for name, values in (("hidden", hidden), ("logits", logits)):
                said.setdefault(name, torch.empty_like(values)).copy_(values)
            return said["hidden"], said["logits"]

        return replay

    engine = engine_with_adapters(tmp_path, lambda model, cache, pool: DecodeGraphs(model, cache, pool, 64, record))
    engine.engine._runner.ahead = True
    model = oracle_model(save_tiny_model(tmp_path / "model", "llama:mini"), None)
    for number, request in enumerate("xy"):
        engine.submit(request, prompt(7, number), max_tokens=3)
    engine.until(lambda: not len(engine.requests), seconds=120)
    assert len(alone) == 2  # iterations that decode
    for number, request in enumerate("xy"):
        assert_greedy_equal(model, prompt(7, number), engine.tokens(request))


def test_the_seconds_of_a_capture_teach_nothing(tmp_path, monkeypatch):
    engine = engine_with_adapters(
        tmp_path, lambda model, cache, pool: DecodeGraphs(model, cache, pool, 64, lambda static: static.run)
    )
    taught = []
    monkeypatch.setattr(engine.engine._scheduler, "observe", lambda plan, *rest: taught.append(len(plan.decodes)))
    engine.submit("x", prompt(7, 1), max_tokens=4)
    engine.until(lambda: not len(engine.requests), seconds=120)
    assert taught == [0, 1, 1]  # the prompt, and all decodes but the first
