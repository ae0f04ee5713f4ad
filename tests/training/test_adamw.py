"""AdamW, schedules and clipping against torch and transformers; the saved state against going on undisturbed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_jobs import SITES, TRAINING
from transformers import get_scheduler

from coserve.server.training.optimizer import AdamW, lr_at
from coserve.server.training.peft.lora import LoraConfig, LoraPair, cast_weights, init_lora
from coserve.server.training.spec import TrainingSpec

torch.set_num_threads(1)
SPEC = TrainingSpec(**{**TRAINING, "betas": (0.9, 0.99), "max_grad_norm": 0.5})
CONFIG = LoraConfig(r=3, alpha=6)


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    return {
        name: LoraPair(
            torch.randn(pair.a.shape, generator=generator, dtype=torch.float64).to(pair.a.dtype) * 0.1,
            torch.randn(pair.b.shape, generator=generator, dtype=torch.float64).to(pair.b.dtype) * 0.1,
        )
        for name, pair in params.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("max_norm", [0.5, None])
def test_fifty_steps_equal_torch_and_transformers_bit_for_bit(dtype, scheduler, max_norm):
    spec = replace(SPEC, lr_scheduler=scheduler, warmup_steps=7, max_grad_norm=max_norm)
    params = cast_weights(init_lora(SITES, CONFIG, 1), "cpu", dtype)
    ours = AdamW(params, spec)
    theirs = [torch.nn.Parameter(tensor.clone()) for pair in params.values() for tensor in (pair.a, pair.b)]
    oracle = torch.optim.AdamW(theirs, lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, weight_decay=0.01)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    schedule = get_scheduler(name, oracle, num_warmup_steps=7, num_training_steps=50)
    for step in range(50):
        grads = gradients(params, step)
        norm = ours.load_gradients(grads)
        assert lr_at(step, spec, 50) == schedule.get_last_lr()[0]
        assert ours.step(lr_at(step, spec, 50))
        for parameter, gradient in zip(theirs, (g for p in grads.values() for g in (p.a, p.b)), strict=True):
            parameter.grad = gradient.clone()
        if max_norm:
            assert norm == float(torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        oracle.step()
        schedule.step()
    for got, want in zip((t for p in params.values() for t in (p.a, p.b)), theirs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
@pytest.mark.parametrize("warmup, total", [(0, 1), (0, 10), (10, 10), (12, 10), (1, 2)])
def test_schedules_at_their_edges(scheduler, warmup, total):
    spec = replace(SPEC, lr_scheduler=scheduler, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=spec.learning_rate)
    schedule = get_scheduler(scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert lr_at(step, spec, total) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restored_state_goes_on_with_the_same_bits(dtype):
    params = cast_weights(init_lora(SITES, CONFIG, 1), "cpu", dtype)
    first = AdamW(params, SPEC)
    for step in range(5):
        first.load_gradients(gradients(params, step))
        first.step(1e-2)
    copied = cast_weights(params, "cpu", dtype)
    second = AdamW(copied, SPEC)
    second.restore({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    for step in range(5, 10):
        for optimizer, weights in ((first, params), (second, copied)):
            optimizer.load_gradients(gradients(weights, step))
            optimizer.step(1e-2)
    for name, pair in params.items():
        assert torch.equal(pair.a, copied[name].a) and torch.equal(pair.b, copied[name].b)


def test_gradients_that_do_not_fit_are_refused():
    params = init_lora(SITES, CONFIG, 1)
    optimizer = AdamW(params, SPEC)
    grads = gradients(params, 0)
    name = SITES[0].name
    grads[name] = LoraPair(grads[name].a.t(), grads[name].b)
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_gradients(grads)
    with pytest.raises(KeyError):
        AdamW(params, SPEC).load_gradients({name: gradients(params, 0)[name]})
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.restore({"x.step": torch.zeros(())})


def test_an_update_that_overflows_is_reported():
    params = init_lora(SITES, CONFIG, 1)
    optimizer = AdamW(params, SPEC)
    finite = []
    for step in range(3):
        optimizer.load_gradients(gradients(params, step))
        finite.append(optimizer.step(3e37))
    assert not finite[-1]
